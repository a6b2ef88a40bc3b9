"""Parts of a model trained whole, against transformers with `requires_grad` set by hand: loss and
gradients, fp32, 1e-5 of the norm (order of summation)."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from llamaweft.adapters.whole import WholeConfig, train_whole, weighted_modules
from llamaweft.data.chat import Document
from llamaweft.export.hf import merged_tensors
from llamaweft.model.folder import read_config
from llamaweft.model.llama import Memory, empty_causal_lm
from llamaweft.model.load import load_causal_lm
from llamaweft.model.pack import Pack
from llamaweft.weights.frozen import FrozenWeight

IDS = np.random.default_rng(0).integers(3, 900, 48).astype(np.int32)
"""Without the padding token, whose row gets no gradient in transformers."""
DOCUMENT = Document(IDS, np.ones(48, np.float32), "")


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def partly_trained(folder: Path, codec: str, wanted: WholeConfig):
    config = read_config(folder)
    names = wanted.among(
        weighted_modules(empty_causal_lm(config)),
        config.num_hidden_layers,
        config.tie_word_embeddings,
    )
    model = load_causal_lm(folder, base_weights=codec, trained=names)
    train_whole(model, [model.get_submodule(name) for name in names])
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("codec", ["fp32", "nf4"])
@pytest.mark.parametrize(
    ("wanted", "means"),
    [
        (WholeConfig(1), r"layers\.1\."),
        (WholeConfig(1, ("norm", "lm_head")), r"layers\.1\.|model\.norm|lm_head"),
        (WholeConfig(0, ("embed_tokens",)), r"embed_tokens"),
        (
            WholeConfig(0, ("layers.0.mlp.down_proj", "post_attention_layernorm")),
            r"0\.mlp\.down|post_attention",
        ),
        (WholeConfig(0, ("layers.0.mlp.up_proj",)), r"0\.mlp\.up"),
        (WholeConfig(0, ("norm",)), r"model\.norm"),
    ],
    ids=["top", "top-norm-head", "embedding", "in-layers", "up_proj", "norm"],
)
def test_gradients_of_what_is_trained_and_none_of_the_rest(
    tiny_folder: Path, tied_folder: Path, tied: bool, codec: str, wanted: WholeConfig, means: str
) -> None:
    folder = tied_folder if tied else tiny_folder
    ours = partly_trained(folder, codec, wanted)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    named = dict(theirs.named_parameters())
    for name, value in merged_tensors(ours):
        named[name].data.copy_(value)
    trained = {n: p for n, p in ours.named_parameters() if p.requires_grad}
    if tied:
        means = means.replace("lm_head", "embed_tokens")
    assert trained.keys() == {name for name in named if re.search(means, name)}
    for name, parameter in named.items():
        parameter.requires_grad_(name in trained)
    ids = torch.from_numpy(IDS.astype(np.int64))
    logits = theirs(ids[None]).logits[0]
    loss = torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="sum")
    loss.backward()
    total, _ = ours.loss(Pack.from_documents([DOCUMENT]))
    total.backward()
    assert relative(total.detach(), loss.detach()) < 1e-5
    assert {n for n, p in ours.named_parameters() if p.grad is not None} == trained.keys()
    for name, parameter in trained.items():
        assert relative(parameter.grad, named[name].grad) < 1e-5, name
    kept = {name: parameter.grad for name, parameter in trained.items()}
    ours.zero_grad()
    ours.model.memory = Memory([frozenset()] * 2)
    ours.loss(Pack.from_documents([DOCUMENT]))[0].backward()
    assert all(torch.equal(kept[name], p.grad) for name, p in trained.items())


def test_what_is_trained_starts_from_the_folder_and_the_rest_is_held_in_the_codec(
    tiny_folder: Path,
) -> None:
    model = partly_trained(tiny_folder, "nf4", WholeConfig(1, ("embed_tokens",)))
    own = dict(load_causal_lm(tiny_folder, base_weights=None).named_parameters())
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n in own if ".layers.1." in n} | {"model.embed_tokens.weight"} == trained.keys()
    assert all(torch.equal(p, own[n]) for n, p in trained.items())
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"):
        weight = model.get_submodule(name).weight
        assert isinstance(weight, FrozenWeight)
        assert weight.codec == "nf4"
