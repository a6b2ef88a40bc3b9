"""Our LoRA against peft's: forward and gradients, fp32, 1e-5 of the norm (order of summation)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from llamaweft.adapters.folder import adapter_state, load_adapter_state, read_adapter, save_adapter
from llamaweft.adapters.lora import LAYER_LINEARS, LoraConfig, inject
from llamaweft.data.chat import Document
from llamaweft.errors import UserError
from llamaweft.model.load import load_causal_lm
from llamaweft.model.pack import Pack

IDS = np.random.default_rng(0).integers(0, 900, 48).astype(np.int32)
DOCUMENT = Document(IDS, np.ones(48, np.float32), "")


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("targets", [LAYER_LINEARS, ("q_proj", "down_proj")])
def test_forward_and_gradients(tiny_folder: Path, use_rslora: bool, targets: tuple) -> None:
    config = LoraConfig(r=4, lora_alpha=12, use_rslora=use_rslora, target_modules=targets)
    ours = load_causal_lm(tiny_folder, base_weights="fp32")
    inject(ours, config)
    theirs = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32),
        PeftConfig(
            r=4,
            lora_alpha=12,
            use_rslora=use_rslora,
            target_modules=list(targets),
            task_type="CAUSAL_LM",
        ),
    )
    torch.manual_seed(3)
    state = {name: torch.randn(t.shape) * 0.1 for name, t in adapter_state(ours).items()}
    load_adapter_state(ours, state, "test")
    named = dict(theirs.named_parameters())
    for name, value in state.items():
        named[name.replace(".weight", ".default.weight")].data.copy_(value)

    ids = torch.from_numpy(IDS.astype(np.int64))
    logits = theirs(ids[None]).logits[0]
    loss = torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="sum")
    loss.backward()
    total, _ = ours.loss(Pack.from_documents([DOCUMENT]))
    total.backward()
    assert relative(total.detach(), loss.detach()) < 1e-5
    trained = {n: p for n, p in ours.named_parameters() if p.requires_grad}
    assert len(trained) == len(state) == 2 * 2 * len(targets)
    for name, parameter in trained.items():
        their = named[f"base_model.model.{name}.default.weight"]
        assert relative(parameter.grad, their.grad) < 1e-5, name


def test_the_folder_opens_in_peft_and_comes_back(tiny_folder: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=8)
    ours = load_causal_lm(tiny_folder, base_weights="fp32")
    inject(ours, config)
    state = {name: torch.randn(t.shape) * 0.1 for name, t in adapter_state(ours).items()}
    load_adapter_state(ours, state, "test")
    save_adapter(ours, config, str(tiny_folder), tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, tmp_path)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(IDS.astype(np.int64))[None]).logits[0]
        assert relative(ours(Pack.from_documents([DOCUMENT])), expected) < 1e-5
    read, base_name, loaded = read_adapter(tmp_path)
    assert (read, base_name) == (config, str(tiny_folder))
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


def test_a_frozen_weight_gets_no_gradient(tiny_folder: Path) -> None:
    model = load_causal_lm(tiny_folder, base_weights="bf16")
    inject(model, LoraConfig())
    total, _ = model.loss(Pack.from_documents([DOCUMENT]))
    total.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".lora_" in name), name
    layer = model.get_submodule("model.layers.0.mlp.up_proj.base_layer")
    assert layer.weight.codec == "bf16"


def test_an_unknown_target_is_an_error(tiny_folder: Path) -> None:
    model = load_causal_lm(tiny_folder, base_weights="fp32")
    with pytest.raises(UserError, match=r"'q_prj'.*q_proj"):
        inject(model, LoraConfig(target_modules=("q_prj",)))


def test_an_adapter_of_another_shape_is_an_error(tiny_folder: Path) -> None:
    model = load_causal_lm(tiny_folder, base_weights="fp32")
    inject(model, LoraConfig(r=4))
    state = adapter_state(model)
    name = next(iter(state))
    with pytest.raises(UserError, match="has shape"):
        load_adapter_state(model, state | {name: torch.zeros(8, 64)}, "there")
    del state[name]
    with pytest.raises(UserError, match="on one side only"):
        load_adapter_state(model, state, "there")
