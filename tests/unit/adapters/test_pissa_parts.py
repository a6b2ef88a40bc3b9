"""PiSSA's small parts: names, what is refused, what the folder says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llamaweft.adapters.lora import LoraConfig, inject, start_pissa
from llamaweft.adapters.pissa import check_codec, iterations, principal
from llamaweft.errors import UserError
from llamaweft.model.load import load_causal_lm


def test_the_iterations_are_in_the_name() -> None:
    assert iterations("pissa") is None
    assert iterations("pissa_niter_16") == 16


@pytest.mark.parametrize(
    ("rslora", "alpha"), [(False, 24), (True, pytest.approx(12 * 2**0.5, rel=1e-15))]
)
def test_the_folder_has_twice_the_rank_and_the_same_scaling(rslora: bool, alpha: float) -> None:
    config = LoraConfig(r=4, lora_alpha=12, use_rslora=rslora, init_lora_weights="pissa")
    assert (config.saved.r, config.saved.lora_alpha) == (8, alpha)
    assert config.saved.scaling == pytest.approx(config.scaling, rel=1e-15)
    assert config.saved.saved == config.saved


def test_the_rest_of_a_matrix_has_no_more_of_the_principal_part() -> None:
    torch.manual_seed(0)
    w_OI = torch.randn(40, 60)
    values = torch.linalg.svdvals(w_OI)
    for init, tolerance in (("pissa", 1e-5), ("pissa_niter_16", 1e-2)):
        a_RI, b_OR = principal(w_OI, 6, init, 0.5)
        rest = torch.linalg.svdvals(w_OI - 0.5 * b_OR @ a_RI)
        torch.testing.assert_close(rest[:34], values[6:], rtol=tolerance, atol=1e-4)


@pytest.mark.parametrize("codec", ["nf4", "int8"])
def test_quantised_weights_are_refused(codec: str) -> None:
    with pytest.raises(UserError, match=rf"{codec} \(they are large\); set base_weights: bf16"):
        check_codec("pissa", codec, "they are large")
    for plain in ("fp32", "bf16"):
        check_codec("pissa", plain, "")


def test_a_rank_without_as_many_singular_values_is_refused(tiny_folder: Path) -> None:
    model = load_causal_lm(tiny_folder, base_weights="fp32")
    with pytest.raises(UserError, match=r"k_proj, .* set adapter\.r: 32 or less"):
        inject(model, LoraConfig(r=33, init_lora_weights="pissa"))
    inject(model, LoraConfig(r=32, init_lora_weights="pissa"))


def test_what_takes_long_is_said(tiny_folder: Path) -> None:
    model = load_causal_lm(tiny_folder, base_weights="fp32")
    config = LoraConfig(r=2, target_modules=("k_proj",), init_lora_weights="pissa_niter_2")
    inject(model, config)
    said: list[str] = []
    start_pissa(model, config, said.append)
    assert said == ["taking the singular values of 2 matrices (pissa_niter_2)"]
