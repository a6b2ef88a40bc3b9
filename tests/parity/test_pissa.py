"""Our PiSSA against peft's, which puts the rest of W in its place: start, forward, gradients, a few
steps and the converted folder. fp32, 1e-5 of the norm (order of summation, and the rest's own
rounding); after steps 1e-4, since Adam divides by small gradients."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llamaweft.adapters.folder import adapter_state, load_adapter_state, read_adapter, save_adapter
from llamaweft.adapters.lora import (
    LAYER_LINEARS,
    LoraConfig,
    PissaLinear,
    constants,
    inject,
    lora_layers,
    start_pissa,
)
from llamaweft.adapters.pissa import principal
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
PISSA = LoraConfig(r=4, lora_alpha=12, init_lora_weights="pissa")
CONFIGS = {
    "pissa": PISSA,
    "rslora": replace(PISSA, use_rslora=True, target_modules=("q_proj", "v_proj", "down_proj")),
}


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def started(folder: Path, codec: str, config: LoraConfig = PISSA) -> LlamaForCausalLM:
    model = load_causal_lm(folder, base_weights=codec)
    inject(model, config)
    start_pissa(model, config, lambda what: None)
    return model


def moved(folder: Path, codec: str, config: LoraConfig = PISSA) -> LlamaForCausalLM:
    """A model whose adapter is far from where it started."""
    model = started(folder, codec, config)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in trained_parameters(model).values():
            parameter.add_(torch.randn(parameter.shape) * parameter.std() / 2)
    return model


def peft_of(folder: Path, codec: str, config: LoraConfig) -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    decoded = dict(merged_tensors(load_causal_lm(folder, base_weights=codec)))
    assert not base.load_state_dict(decoded, strict=False).unexpected_keys
    asked = PeftConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,
        use_rslora=config.use_rslora,
        init_lora_weights=config.init_lora_weights,
        target_modules=list(config.target_modules),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(base, asked)


def their_name(ours: str) -> str:
    return f"base_model.model.{ours}.default.weight"


def their_loss(model: PeftModel) -> torch.Tensor:
    ids = torch.from_numpy(IDS.astype(np.int64))
    logits = model(ids[None]).logits[0]
    return torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="sum")


@torch.no_grad()
def their_logits(model: torch.nn.Module) -> torch.Tensor:
    return model(torch.from_numpy(IDS.astype(np.int64))[None]).logits[0]


@torch.no_grad()
def our_logits(model: LlamaForCausalLM) -> torch.Tensor:
    return model(Pack.from_documents([DOCUMENT]))


@pytest.mark.parametrize("codec", ["fp32", "bf16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_start_gradients_and_steps(tiny_folder: Path, codec: str, name: str) -> None:
    config = CONFIGS[name]
    ours, theirs = started(tiny_folder, codec, config), peft_of(tiny_folder, codec, config)
    trained, named = trained_parameters(ours), dict(theirs.named_parameters())
    assert len(trained) == 2 * 2 * len(config.target_modules)
    optimizer = build_optimizer("adamw", trained, weight_decay=0.0, betas=(0.9, 0.99), eps=1e-8)
    set_learning_rate(optimizer, 1e-3)
    their_optimizer = torch.optim.AdamW(
        [p for p in named.values() if p.requires_grad],
        lr=1e-3,
        betas=(0.9, 0.99),
        weight_decay=0.0,
    )
    for step in range(3):
        tolerance = TOLERANCE if step == 0 else 10 * TOLERANCE
        expected = their_loss(theirs)
        expected.backward()
        total, _ = ours.loss(Pack.from_documents([DOCUMENT]))
        total.backward()
        assert relative(total.detach(), expected.detach()) < tolerance
        for key, parameter in trained.items():
            their = named[their_name(key)]
            assert relative(parameter.detach(), their.detach()) < tolerance, (step, key)
            assert relative(parameter.grad, their.grad) < tolerance, (step, key)
        optimizer.step()
        optimizer.zero_grad()
        their_optimizer.step()
        their_optimizer.zero_grad()
    assert relative(our_logits(ours), their_logits(theirs)) < 10 * TOLERANCE


@pytest.mark.parametrize("name", CONFIGS)
def test_the_folder_is_what_peft_converts_and_opens_on_the_base(
    tiny_folder: Path, tmp_path: Path, name: str
) -> None:
    config = CONFIGS[name]
    ours, theirs = moved(tiny_folder, "fp32", config), peft_of(tiny_folder, "fp32", config)
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(str(tmp_path / "start"))
    named = dict(theirs.named_parameters())
    for key, parameter in trained_parameters(ours).items():
        named[their_name(key)].data.copy_(parameter.detach())
    converted, written = tmp_path / "converted", tmp_path / "written"
    theirs.save_pretrained(
        str(converted), path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    save_adapter(ours, config, str(tiny_folder), written)
    our_state, their_state = (
        load_file(folder / "adapter_model.safetensors") for folder in (written, converted)
    )
    assert our_state.keys() == their_state.keys()
    for key, value in their_state.items():
        assert relative(our_state[key], value) < TOLERANCE, key
    our_config, their_config = (
        json.loads((folder / "adapter_config.json").read_text()) for folder in (written, converted)
    )
    for key in ("r", "lora_alpha", "use_rslora", "init_lora_weights", "use_dora"):
        assert our_config[key] == their_config[key], key

    base = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    expected = their_logits(PeftModel.from_pretrained(base, written))
    assert relative(our_logits(ours), expected) < TOLERANCE
    read, _, state = read_adapter(written)
    assert read == config.saved
    plain = load_causal_lm(tiny_folder, base_weights="fp32")
    inject(plain, read)
    load_adapter_state(plain, state, "test")
    assert relative(our_logits(plain), our_logits(ours)) < TOLERANCE
    again = load_causal_lm(tiny_folder, base_weights="fp32")
    inject(again, config)
    load_adapter_state(again, state, "test")
    assert torch.equal(our_logits(again), our_logits(ours))
    for get in (adapter_state, constants, trained_parameters):
        assert all(torch.equal(get(again)[key], value) for key, value in get(ours).items())


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_0", "pissa_niter_4"])
def test_one_matrix_starts_as_pefts_from_the_same_random_numbers(init: str) -> None:
    from peft.tuners.lora.layer import Linear as PeftLinear

    torch.manual_seed(0)
    base = torch.nn.Linear(96, 64, bias=False)
    w_OI = base.weight.detach().clone()
    theirs = PeftLinear(base, "default", PeftConfig(lora_alpha=10), r=5, lora_alpha=10)
    torch.manual_seed(7)
    theirs.pissa_init("default", init)
    torch.manual_seed(7)
    a_RI, b_OR = principal(w_OI, 5, init, 10 / 5)
    assert torch.equal(a_RI, theirs.lora_A["default"].weight)
    assert torch.equal(b_OR, theirs.lora_B["default"].weight)
    rest = w_OI - 2 * b_OR @ a_RI
    torch.testing.assert_close(rest, base.weight.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_starts_as_the_base_bit_for_bit(tiny_folder: Path, dtype: torch.dtype) -> None:
    base = load_causal_lm(tiny_folder, base_weights="bf16", compute_dtype=dtype)
    expected = our_logits(base)
    inject(base, PISSA)
    start_pissa(base, PISSA, lambda what: None)
    assert torch.equal(our_logits(base), expected)


@pytest.mark.parametrize("codec", ["fp32", "bf16"])
def test_the_gradient_of_the_input(codec: str) -> None:
    """Of one layer, against autograd with the matrix written out."""
    torch.manual_seed(0)
    frozen = FrozenWeight(codec, (96, 64), encode(codec, torch.randn(96, 64) / 8))
    linear = Linear(64, 96)
    linear.hold(frozen)
    layer = PissaLinear(linear, PISSA)
    layer.start("pissa")
    with torch.no_grad():
        layer.lora_A.mul_(1.3)
        layer.lora_B.add_(torch.randn(96, 4) / 10)
    x, g = torch.randn(9, 64, requires_grad=True), torch.randn(9, 96)
    layer(x).backward(g)
    again, halves = x.detach().requires_grad_(), (layer.lora_A, layer.lora_B)
    a, b = (half.detach().clone().requires_grad_() for half in halves)
    update = b @ a - layer.initial_B @ layer.initial_A
    (again @ (frozen.dequantised() + layer.scaling * update).t()).backward(g)
    for ours, theirs in ((x, again), (layer.lora_A, a), (layer.lora_B, b)):
        assert relative(ours.grad, theirs.grad) < TOLERANCE


def test_in_bf16_the_update_does_not_drown_in_what_is_taken_off() -> None:
    """x [A; A - A0]^T [B - B0, B0]^T against x [A; A0]^T [B, -B0]^T, after a small step."""
    torch.manual_seed(0)
    linear = Linear(64, 96)
    linear.hold(FrozenWeight("fp32", (96, 64), {"values": torch.zeros(96, 64)}))
    layer = PissaLinear(linear, PISSA)
    with torch.no_grad():
        for half, start in ((layer.lora_A, layer.initial_A), (layer.lora_B, layer.initial_B)):
            start.normal_()
            half.copy_(start + 1e-3 * torch.randn(start.shape))
    x = torch.randn(9, 64)
    exact, in_bf16 = layer(x).detach(), layer(x.bfloat16()).detach()
    a_SI, b_OS = (half.bfloat16() for half in layer.stacked())
    plain = layer.scaling * (x.bfloat16() @ a_SI.t()) @ b_OS.t()
    assert relative(in_bf16.float(), exact) < 0.01
    assert relative(plain.float(), exact) > 0.5


def test_merged_it_answers_the_same(tiny_folder: Path) -> None:
    ours = moved(tiny_folder, "bf16")
    merged = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    merged.load_state_dict(dict(merged_tensors(ours)), strict=False)
    assert relative(our_logits(ours), their_logits(merged)) < TOLERANCE


def test_kept_or_recomputed_the_bits_are_the_same(tiny_folder: Path) -> None:
    def gradients(names: set[str]) -> list[torch.Tensor | None]:
        model = moved(tiny_folder, "bf16")
        model.model.memory = Memory([frozenset(names)] * 2, 20)
        total, _ = model.loss(Pack.from_documents([DOCUMENT]))
        total.backward()
        return [p.grad for p in trained_parameters(model).values()]

    everything = gradients(set(KEEPABLE))
    for names in [set(), {"mid"}, {"up_proj", "o_proj", "attention"}]:
        for kept, again in zip(everything, gradients(names), strict=True):
            assert torch.equal(kept, again), names


def test_only_a_and_b_are_trained(tiny_folder: Path) -> None:
    model = started(tiny_folder, "fp32")
    layers = lora_layers(model)
    assert set(trained_parameters(model)) == {
        f"{name}.{half}" for name in layers for half in ("lora_A", "lora_B")
    }
    assert len(layers) == 2 * len(LAYER_LINEARS)
