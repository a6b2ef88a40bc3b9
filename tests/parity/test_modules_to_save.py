"""Modules trained whole beside an adapter, against peft's `modules_to_save`: forward and gradients,
fp32, 1e-5 of the norm (order of summation)."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from llamaweft.adapters.folder import CONFIG, adapter_state, load_adapter_state, save_adapter
from llamaweft.adapters.lora import LAYER_LINEARS, LoraConfig, inject
from llamaweft.adapters.whole import WholeConfig, train_whole, weighted_modules
from llamaweft.data.chat import Document
from llamaweft.errors import UserError
from llamaweft.model.load import load_causal_lm
from llamaweft.model.pack import Pack
from llamaweft.recipe import Recipe
from llamaweft.subject import open_subject

IDS = np.random.default_rng(0).integers(3, 900, 48).astype(np.int32)
"""Without the padding token, whose row gets no gradient in transformers."""
DOCUMENT = Document(IDS, np.ones(48, np.float32), "")
IN_FP32 = Recipe.validate_tree(
    {
        "model": "not read",
        "data": {"train": "not read"},
        "base_weights": "fp32",
        "training": {"compute_dtype": "fp32", "device": "cpu"},
    }
)
CASES = [
    (False, ("embed_tokens", "lm_head")),
    (False, ("norm", "input_layernorm")),
    (False, ("lm_head", "layers.1.mlp.down_proj")),
    (True, ("embed_tokens",)),
    (True, ("lm_head", "norm")),
]


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def adapted(folder: Path, tied: bool, modules: tuple, use_dora: bool = False):
    """A model with random numbers in all that is trained."""
    targets = tuple(t for t in LAYER_LINEARS if t != "down_proj")
    config = LoraConfig(r=4, lora_alpha=12, target_modules=targets, use_dora=use_dora)
    names = WholeConfig(0, modules).among(
        weighted_modules(load_causal_lm(folder, base_weights=None)), 2, tied
    )
    model = load_causal_lm(folder, base_weights="fp32", trained=names)
    inject(model, config)
    train_whole(model, [model.get_submodule(name) for name in names])
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape) * 0.1
    return model, config


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize(("tied", "modules"), CASES)
def test_forward_and_gradients(
    tiny_folder: Path, tied_folder: Path, tied: bool, modules: tuple, use_dora: bool
) -> None:
    folder = tied_folder if tied else tiny_folder
    ours, config = adapted(folder, tied, modules, use_dora)
    longer = {"norm": "model.norm"}  # of peft all that ends so
    theirs = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        PeftConfig(
            r=4,
            lora_alpha=12,
            use_dora=use_dora,
            target_modules=list(config.target_modules),
            modules_to_save=[longer.get(name, name) for name in modules],
            ensure_weight_tying=tied,
            task_type="CAUSAL_LM",
        ),
    )
    named = dict(theirs.named_parameters(remove_duplicate=False))
    state = adapter_state(ours)
    theirs_of = {}
    for name in state:
        module, _, attribute = name.rpartition(".")
        for spelled in (
            f"{module}.default.{attribute}",
            f"{module}.modules_to_save.default.{attribute}",
            f"{name}.default.weight",
            f"{name}.default",
        ):
            if spelled in named:
                theirs_of[name] = named[spelled]
    assert theirs_of.keys() == state.keys()
    for name, value in state.items():
        theirs_of[name].data.copy_(value)
    trained = {id(p) for p in theirs.parameters() if p.requires_grad}
    assert trained == {id(p) for p in theirs_of.values()}
    numbers = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert sum(p.numel() for p in ours.parameters() if p.requires_grad) == numbers

    ids = torch.from_numpy(IDS.astype(np.int64))
    logits = theirs(ids[None]).logits[0]
    loss = torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="sum")
    loss.backward()
    total, _ = ours.loss(Pack.from_documents([DOCUMENT]))
    total.backward()
    assert relative(total.detach(), loss.detach()) < 1e-5
    for name, parameter in ours.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if parameter.requires_grad:
            key = f"base_model.model.{name}"
            their = theirs_of.get(key, theirs_of.get(f"{key}.weight"))
            assert relative(parameter.grad, their.grad) < 1e-5, name


@pytest.mark.parametrize(("tied", "modules"), CASES)
def test_the_folder_opens_in_peft_and_here(
    tiny_folder: Path, tied_folder: Path, tmp_path: Path, tied: bool, modules: tuple
) -> None:
    folder = tied_folder if tied else tiny_folder
    ours, config = adapted(folder, tied, modules)
    save_adapter(ours, config, str(folder), tmp_path)
    expected = ours(Pack.from_documents([DOCUMENT])).detach()
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.from_numpy(IDS.astype(np.int64))[None]
    with torch.no_grad():
        assert relative(PeftModel.from_pretrained(base, tmp_path)(ids).logits[0], expected) < 1e-5
        back = open_subject(str(tmp_path), IN_FP32).model
        assert torch.equal(back(Pack.from_documents([DOCUMENT])), expected)
    assert {n for n, p in back.named_parameters() if p.requires_grad} == {
        n for n, p in ours.named_parameters() if p.requires_grad
    }
    saved = json.loads((tmp_path / CONFIG).read_text())["modules_to_save"]
    wanted = {"norm": "model.norm", "layers.1.mlp.down_proj": "1.mlp.down_proj"}
    said = {wanted.get(name, name) for name in modules}
    assert {*saved} == (said | {"embed_tokens", "lm_head"} if tied else said)


@pytest.mark.parametrize("ties", [False, True])
def test_a_folder_of_peft_opens_here_unless_it_unties_the_model(
    tiny_folder: Path, tied_folder: Path, tmp_path: Path, ties: bool
) -> None:
    ids = torch.from_numpy(IDS.astype(np.int64))[None]
    for folder, tied in ((tiny_folder, False), (tied_folder, True)):
        config = PeftConfig(
            r=4,
            target_modules=["q_proj"],
            modules_to_save=["embed_tokens"],
            ensure_weight_tying=tied and ties,
            task_type="CAUSAL_LM",
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            theirs = get_peft_model(base, config)
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.data += torch.randn(parameter.shape) * 0.1
        there = tmp_path / folder.name
        theirs.save_pretrained(there)
        if tied and not ties:
            with pytest.raises(UserError, match="one matrix for embedding and head"):
                open_subject(str(there), IN_FP32)
            continue
        ours = open_subject(str(there), IN_FP32).model
        with torch.no_grad():
            expected = theirs(ids).logits[0]
            assert relative(ours(Pack.from_documents([DOCUMENT])), expected) < 1e-5


def test_ends_of_a_tied_matrix_that_differ_are_an_error(tied_folder: Path) -> None:
    ours, _ = adapted(tied_folder, True, ("lm_head",))
    state = {name: tensor.clone() for name, tensor in adapter_state(ours).items()}
    state["base_model.model.lm_head.weight"] += 1
    with pytest.raises(UserError, match="one matrix for both"):
        load_adapter_state(ours, state, "there")
