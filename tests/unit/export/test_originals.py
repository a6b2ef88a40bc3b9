"""Merging: row by row as whole, and into the base model's own numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from llamaweft.adapters.lora import LoraConfig, inject, lora_layers, start_pissa
from llamaweft.errors import UserError
from llamaweft.export.hf import merged_sources, merged_tensors
from llamaweft.export.originals import (
    hold_originals,
    holds_originals,
    merge_base,
    originals,
)
from llamaweft.export.parity import our_logits
from llamaweft.model.folder import TensorFile
from llamaweft.model.init import init_random
from llamaweft.model.load import load_causal_lm
from llamaweft.model.new_tokens import NewTokens, grow
from llamaweft.runtime import anon_bytes
from llamaweft.weights.linear import Embedding, Linear

KINDS = {
    "lora": LoraConfig(r=4, lora_alpha=8),
    "dora": LoraConfig(r=4, lora_alpha=8, use_dora=True),
    "pissa": LoraConfig(r=4, lora_alpha=8, init_lora_weights="pissa"),
}
PROMPTS = [np.arange(5, 60, 3, dtype=np.int32), np.arange(900, 1000, dtype=np.int32)]


def adapted(folder: Path, codec: str, kind: str, new: NewTokens | None = None):
    """A tiny model in a codec with an adapter of random numbers."""
    torch.manual_seed(3)
    model = load_causal_lm(folder, base_weights=codec)
    if new is not None:
        grow(model, new)
    inject(model, KINDS[kind])
    if kind == "pissa":
        start_pissa(model, KINDS[kind], lambda what: None)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B.add_(torch.randn_like(layer.lora_B) * 0.05)
            if kind == "dora":
                layer.lora_magnitude_vector.mul_(1.2)
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_merged_rows_are_those_of_the_whole(tiny_folder: Path, kind: str) -> None:
    model = adapted(tiny_folder, "fp32" if kind == "pissa" else "nf4", kind)
    whole = dict(merged_tensors(model))
    found = {
        s.name: torch.cat([rows.clone() for rows in s.chunks(7)]) for s in merged_sources(model)
    }
    assert found.keys() == whole.keys()
    for source in merged_sources(model):
        assert source.shape == tuple(whole[source.name].shape)
    for name, tensor in whole.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=2e-7)
    layers = lora_layers(model)
    torch.testing.assert_close(
        whole["model.layers.1.mlp.up_proj.weight"], layers["model.layers.1.mlp.up_proj"].merged()
    )


@pytest.mark.parametrize("tokens", [("<a>", "<b>"), ("<a>", "<b>", "<c>")])
def test_rows_of_new_tokens_stand_in_their_places(
    tiny_folder: Path, tokens: tuple[str, ...]
) -> None:
    """From spare rows of the matrix to beyond its end."""
    rows = 49152
    new = NewTokens(tokens, rows - 2, tuple((5, 6) for _ in tokens))
    model = adapted(tiny_folder, "int8", "lora", new)
    base = load_causal_lm(tiny_folder, base_weights="int8").lm_head.weight.dequantised()
    expected = torch.cat([base[: rows - 2], model.lm_head.weight.new_NE.detach()])
    for size in (1000, rows - 2, rows - 1, 2 * rows):
        (head,) = (s for s in merged_sources(model) if s.name == "lm_head.weight")
        assert head.shape == (rows - 2 + len(tokens), 64)
        assert torch.equal(torch.cat([part.clone() for part in head.chunks(size)]), expected)


@pytest.mark.parametrize(("codec", "kind"), [("nf4", "lora"), ("int8", "dora"), ("bf16", "pissa")])
def test_original_weights_take_the_place_of_held_ones(
    tiny_folder: Path, codec: str, kind: str
) -> None:
    """With the adapter that was trained on the held ones: as a model that holds fp32 has it."""
    model, exact = adapted(tiny_folder, codec, kind), adapted(tiny_folder, "fp32", kind)
    with torch.no_grad():  # the same adapter: that of PiSSA and DoRA starts from what is held
        for name, layer in lora_layers(model).items():
            other = lora_layers(exact)[name]
            for key, value in layer.named_parameters(recurse=False):
                getattr(other, key).copy_(value)
            for key, value in layer.named_buffers(recurse=False):
                getattr(other, key).copy_(value)
    held = our_logits(model, PROMPTS)
    hold_originals(model, originals(tiny_folder))
    for ours, theirs, before in zip(
        our_logits(model, PROMPTS), our_logits(exact, PROMPTS), held, strict=True
    ):
        assert (before - theirs).norm() / theirs.norm() > 1e-3
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)
    merged = dict(merged_tensors(model))
    for name, tensor in merged_tensors(exact):
        torch.testing.assert_close(merged[name], tensor, rtol=0, atol=2e-7)


@pytest.mark.parametrize("tied", [False, True])
def test_embedding_and_head_are_original_too(
    tiny_folder: Path, tied_folder: Path, tied: bool
) -> None:
    folder = tied_folder if tied else tiny_folder
    new = NewTokens(("<a>",), 49152, ((5, 6),))
    model = adapted(folder, "nf4", "lora", new)
    own = {name: tensor.read() for name, tensor in originals(folder).items()}
    hold_originals(model, originals(folder))
    if tied:
        assert model.lm_head.weight is model.model.embed_tokens.weight
    merged = dict(merged_tensors(model))
    for name in ["model.embed_tokens.weight", *([] if tied else ["lm_head.weight"])]:
        assert torch.equal(merged[name][:49152], own[name])
        assert merged[name].shape[0] == 49153


def test_what_is_merged_into_is_chosen_and_refused(tiny_folder: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    init_random("tiny", store, "builtin:smollm2-135m", "int8", seed=0)
    assert merge_base("auto", tiny_folder, "nf4", False) == "original"
    assert merge_base("dequantised", tiny_folder, "nf4", False) == "dequantised"
    assert merge_base("auto", store, "int8", False) == "dequantised"
    assert merge_base("auto", tiny_folder, "fp32", True) is None
    with pytest.raises(UserError, match="holds its weights in int8 and nothing else"):
        merge_base("original", store, "int8", False)
    with pytest.raises(UserError, match="trained every weight"):
        merge_base("original", tiny_folder, "fp32", True)
    with pytest.raises(UserError, match="give one of auto, original, dequantised"):
        merge_base("both", tiny_folder, "nf4", False)


def test_weights_that_are_held_as_they_are_need_no_exchange(tiny_folder: Path) -> None:
    tensors = originals(tiny_folder)  # fp32
    assert [holds_originals(tensors, c) for c in ("fp32", "bf16", "int8", "nf4")] == [
        True, False, False, False,
    ]  # fmt: skip


def test_originals_are_mapped_and_take_no_memory(tmp_path: Path) -> None:
    """64 MiB of a file, read whole."""
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.ones(4096, 4096)}, path)
    tensor = TensorFile(path, "weight", (4096, 4096), "F32")
    before = anon_bytes()
    held = tensor.mapped()
    assert float(held.sum()) == 4096 * 4096
    assert anon_bytes() - before < 16 * 2**20


def test_all_originals_decode_into_one_buffer(tiny_folder: Path) -> None:
    """Each would keep what its largest rows took: of an 8B as much as the model itself."""
    model = adapted(tiny_folder, "nf4", "lora")
    hold_originals(model, originals(tiny_folder))
    held = [m.weight for m in model.modules() if isinstance(m, Linear | Embedding)]
    assert len(held) > 10
    assert len({id(weight._scratch) for weight in held}) == 1
