"""Loading: a sharded folder gives the model that the single file gives."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from llamaweft.model import save
from llamaweft.model.init import init_random
from llamaweft.model.load import load_causal_lm


def test_shards_hold_the_same_model(tiny_folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(save, "SHARD_BYTES", 10**6)
    init_random("tiny", tmp_path / "sharded", "builtin:smollm2-135m", "fp32", seed=1)
    index = json.loads((tmp_path / "sharded/model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    expected = load_file(tiny_folder / "model.safetensors")
    loaded = dict(load_causal_lm(tmp_path / "sharded", base_weights=None).named_parameters())
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_frozen_matrices_are_held_in_their_codec_and_norms_in_fp32(tiny_folder: Path) -> None:
    model = load_causal_lm(tiny_folder, base_weights="nf4")
    assert [p.dtype for p in model.parameters()] == [torch.float32] * 5
    assert not any(p.requires_grad for p in model.parameters())
    assert model.model.layers[1].mlp.up_proj.weight.codec == "nf4"
    assert model.model.embed_tokens.weight.codec == model.lm_head.weight.codec == "int8"
