"""Our DoRA against peft's: forward and gradients, fp32, 1e-5 of the norm (order of summation)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import AutoModelForCausalLM

from llamaweft.adapters.folder import adapter_state, load_adapter_state, read_adapter, save_adapter
from llamaweft.adapters.lora import LAYER_LINEARS, DoraLinear, LoraConfig, inject, lora_layers
from llamaweft.data.chat import Document
from llamaweft.export.hf import merged_tensors
from llamaweft.model.llama import LlamaForCausalLM, Memory
from llamaweft.model.load import load_causal_lm
from llamaweft.model.pack import Pack
from llamaweft.model.replay import KEEPABLE
from llamaweft.train.optim import build_optimizer, set_learning_rate, trained_parameters
from llamaweft.weights.frozen import FrozenWeight, encode
from llamaweft.weights.linear import Linear

IDS = np.random.default_rng(0).integers(0, 900, 48).astype(np.int32)
DOCUMENT = Document(IDS, np.ones(48, np.float32), "")
TOLERANCE = 1e-5
DORA = LoraConfig(r=4, lora_alpha=12, use_dora=True)


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def moved(folder: Path, codec: str, config: LoraConfig = DORA) -> LlamaForCausalLM:
    """A model whose adapter is far from where it starts."""
    model = load_causal_lm(folder, base_weights=codec)
    inject(model, config)
    torch.manual_seed(3)
    state = {
        name: value * (1 + 0.2 * torch.randn(value.shape))
        if value.ndim == 1
        else 0.1 * torch.randn(value.shape)
        for name, value in adapter_state(model).items()
    }
    load_adapter_state(model, state, "test")
    return model


def peft_of(folder: Path, codec: str, config: LoraConfig) -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    decoded = dict(merged_tensors(load_causal_lm(folder, base_weights=codec)))
    assert not base.load_state_dict(decoded, strict=False).unexpected_keys
    asked = PeftConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,
        use_rslora=config.use_rslora,
        use_dora=True,
        target_modules=list(config.target_modules),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(base, asked)


@pytest.mark.parametrize("codec", ["nf4", "int8", "bf16", "fp32"])
@pytest.mark.parametrize("targets", [LAYER_LINEARS, ("q_proj", "down_proj")], ids=["all", "two"])
def test_forward_and_gradients(tiny_folder: Path, codec: str, targets: tuple[str, ...]) -> None:
    config = replace(DORA, use_rslora=len(targets) == 2, target_modules=targets)
    ours, theirs = moved(tiny_folder, codec, config), peft_of(tiny_folder, codec, config)
    state, named = adapter_state(ours), dict(theirs.named_parameters())
    for name, value in state.items():
        place = f"{name.removesuffix('.weight')}.default.weight"
        named[place].data.copy_(value)
    ids = torch.from_numpy(IDS.astype(np.int64))
    logits = theirs(ids[None]).logits[0]
    expected = torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="sum")
    expected.backward()
    for keep in (frozenset(), frozenset({"up_proj", "o_proj", "attention"}), frozenset({"mid"})):
        ours.model.memory = Memory([keep] * 2, mlp_tile_tokens=20)
        ours.zero_grad()
        total, _ = ours.loss(Pack.from_documents([DOCUMENT]))
        total.backward()
        assert relative(total.detach(), expected.detach()) < TOLERANCE
        trained = trained_parameters(ours)
        assert len(trained) == len(state) == 2 * 3 * len(targets)
        for name, parameter in trained.items():
            their = named[f"base_model.model.{name}.default.weight"]
            assert relative(parameter.grad, their.grad) < TOLERANCE, name


@pytest.mark.parametrize("codec", ["fp32", "nf4"])
def test_the_gradient_of_the_input(codec: str) -> None:
    """Of one layer, against autograd with the matrix written out."""
    torch.manual_seed(0)
    base = torch.nn.Linear(64, 96, bias=False)
    frozen = FrozenWeight(codec, (96, 64), encode(codec, base.weight.detach()))
    linear = Linear(64, 96)
    linear.hold(frozen)
    layer = DoraLinear(linear, DORA)
    torch.nn.init.normal_(layer.lora_B, std=0.1)
    x, g = torch.randn(9, 64, requires_grad=True), torch.randn(9, 96)
    layer(x).backward(g)
    again = x.detach().requires_grad_()
    whole = frozen.dequantised() + layer.scaling * (layer.lora_B @ layer.lora_A)
    norm = whole.detach().norm(dim=1)
    (again @ (whole * (layer.lora_magnitude_vector / norm)[:, None]).t()).backward(g)
    assert relative(x.grad, again.grad) < TOLERANCE


def test_it_starts_as_the_base(tiny_folder: Path) -> None:
    for codec in ("fp32", "nf4"):
        base = load_causal_lm(tiny_folder, base_weights=codec)
        expected = base(Pack.from_documents([DOCUMENT]))
        inject(base, DORA)
        assert torch.equal(base(Pack.from_documents([DOCUMENT])), expected)


def test_the_folder_is_pefts_opens_in_peft_and_comes_back(
    tiny_folder: Path, tmp_path: Path
) -> None:
    ours = moved(tiny_folder, "fp32")
    save_adapter(ours, DORA, str(tiny_folder), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["use_dora"] is True
    written = get_peft_model_state_dict(peft_of(tiny_folder, "fp32", DORA))
    state = adapter_state(ours)
    assert {n: t.shape for n, t in state.items()} == {n: t.shape for n, t in written.items()}
    base = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, tmp_path)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(IDS.astype(np.int64))[None]).logits[0]
        assert relative(ours(Pack.from_documents([DOCUMENT])), expected) < TOLERANCE
    read, _, loaded = read_adapter(tmp_path)
    assert read == DORA
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


def test_merged_it_answers_the_same(tiny_folder: Path) -> None:
    ours = moved(tiny_folder, "nf4")
    merged = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    merged.load_state_dict(dict(merged_tensors(ours)), strict=False)
    with torch.no_grad():
        expected = merged(torch.from_numpy(IDS.astype(np.int64))[None]).logits[0]
        assert relative(ours(Pack.from_documents([DOCUMENT])), expected) < TOLERANCE


def test_kept_or_recomputed_the_bits_are_the_same(tiny_folder: Path) -> None:
    def gradients(names: set[str]) -> list[torch.Tensor | None]:
        model = moved(tiny_folder, "nf4")
        model.model.memory = Memory([frozenset(names)] * 2, 20)
        total, _ = model.loss(Pack.from_documents([DOCUMENT]))
        total.backward()
        return [p.grad for p in trained_parameters(model).values()]

    everything = gradients({*KEEPABLE, "o_proj", "down_proj"})
    for names in [set(), {"mid"}, {"o_proj"}, {"down_proj", "mid", "k_proj"}, set(KEEPABLE)]:
        for kept, again in zip(everything, gradients(names), strict=True):
            assert torch.equal(kept, again), names


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_the_norms_follow_a_step(tiny_folder: Path, name: str) -> None:
    if name == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    model = moved(tiny_folder, "nf4")
    trained = trained_parameters(model)
    optimizer = build_optimizer(name, trained, weight_decay=0.0, betas=(0.9, 0.99), eps=1e-8)
    set_learning_rate(optimizer, 0.05)
    for _ in range(2):
        total, _ = model.loss(Pack.from_documents([DOCUMENT]))
        total.backward()
        optimizer.step()
    for layer in lora_layers(model).values():
        whole = layer.base_layer.dequantised() + layer.scaling * (layer.lora_B @ layer.lora_A)
        assert relative(layer.norm(), whole.detach().norm(dim=1)) < TOLERANCE


def test_the_norms_are_computed_once_a_step(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = moved(tiny_folder, "nf4")
    asked = []
    monkeypatch.setattr(
        "llamaweft.adapters.lora.row_norms",
        lambda squares, *rest: asked.append(1) or squares.sqrt().float(),
    )
    for _ in range(3):
        total, _ = model.loss(Pack.from_documents([DOCUMENT]))
        total.backward()
    assert len(asked) == len(lora_layers(model))


def test_a_row_of_zeros_stays_zero() -> None:
    w = torch.randn(64, 64)
    w[5] = 0
    linear = Linear(64, 64)
    linear.hold(FrozenWeight("fp32", (64, 64), {"values": w}))
    layer = DoraLinear(linear, DORA)
    x = torch.randn(3, 64, requires_grad=True)
    y = layer(x)
    y.square().sum().backward()
    assert not y[:, 5].any()
    for grad in (x.grad, layer.lora_A.grad, layer.lora_B.grad, layer.lora_magnitude_vector.grad):
        assert grad.isfinite().all()
