"""The compute dtype that a device gets, and what weights are held in."""

from __future__ import annotations

import pytest
import torch

from llamaweft.runtime import COMPUTE_DTYPES, DTYPES, Runtime, choose_runtime, environment


@pytest.mark.parametrize(
    ("capability", "dtype", "words"),
    [
        ((9, 0), torch.bfloat16, "bf16 at full rate"),
        ((8, 0), torch.bfloat16, "bf16 at full rate"),
        ((7, 5), torch.float16, "this GPU multiplies fp16 at full rate (gradients are scaled)"),
        ((7, 0), torch.float16, "this GPU multiplies fp16 at full rate (gradients are scaled)"),
    ],
)
def test_a_gpu_computes_in_what_it_is_fast_in(
    capability: tuple[int, int], dtype: torch.dtype, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    runtime = choose_runtime("cuda")
    assert runtime.compute_dtype == dtype
    assert words in runtime.reason


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)],
)
def test_a_recipe_gets_the_dtype_it_asks_for(name: str, dtype: torch.dtype) -> None:
    runtime = choose_runtime("cpu", name)
    assert runtime.compute_dtype == dtype
    assert runtime.compute_dtype_name == name
    assert runtime.reason == "asked for by the recipe"


def test_no_weight_is_held_in_fp16() -> None:
    assert list(DTYPES) == ["fp32", "bf16"]
    assert COMPUTE_DTYPES.keys() - DTYPES.keys() == {"fp16"}


def test_the_environment_names_the_dtype_and_its_reason() -> None:
    content = environment(Runtime(torch.device("cpu"), torch.float16, "because", 1))
    assert (content["compute_dtype"], content["compute_dtype_reason"]) == ("fp16", "because")
    assert "bitsandbytes" in content
