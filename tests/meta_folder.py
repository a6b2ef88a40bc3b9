"""Folders in Meta's layout, small and the same on every machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TINY = {"dim": 64, "n_layers": 2, "n_heads": 4, "norm_eps": 1e-05, "multiple_of": 32}
BY_COLUMNS = ("attention.wo.weight", "feed_forward.w2.weight")


def numbers(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Scattered numbers between -0.05 and 0.05 from whole-number arithmetic alone."""
    count = torch.Size(shape).numel()
    mixed = (torch.arange(count, dtype=torch.int64) * 2654435761 + seed * 40503) % 65521
    return ((mixed.double() / 65521 - 0.5) / 10).to(dtype).reshape(shape)


def whole_tensors(
    params: dict[str, Any], vocab: int, tied: bool = False, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Tensor]:
    """Every tensor of a model, unsliced, by Meta's names."""
    dim, heads = params["dim"], params["n_heads"]
    kv = dim // heads * (params.get("n_kv_heads") or heads)
    inner = int((params.get("ffn_dim_multiplier") or 1) * int(8 * dim / 3))
    inner += -inner % params["multiple_of"]
    layer = {
        "attention.wq.weight": (dim, dim),
        "attention.wk.weight": (kv, dim),
        "attention.wv.weight": (kv, dim),
        "attention.wo.weight": (dim, dim),
        "feed_forward.w1.weight": (inner, dim),
        "feed_forward.w2.weight": (dim, inner),
        "feed_forward.w3.weight": (inner, dim),
        "attention_norm.weight": (dim,),
        "ffn_norm.weight": (dim,),
    }
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (vocab, dim)}
    for index in range(params["n_layers"]):
        shapes |= {f"layers.{index}.{name}": shape for name, shape in layer.items()}
    shapes |= {"norm.weight": (dim,), "output.weight": (vocab, dim)}
    tensors = {
        name: numbers(shape, seed, dtype) + (1 if len(shape) == 1 else 0)
        for seed, (name, shape) in enumerate(shapes.items())
    }
    if tied:
        tensors["output.weight"] = tensors["tok_embeddings.weight"].clone()
    return tensors


def sliced(tensors: dict[str, Tensor], shards: int, embedding_side: int) -> list[dict[str, Tensor]]:
    """The part of each shard, as fairscale's parallel layers hold it."""
    parts: list[dict[str, Tensor]] = [{} for _ in range(shards)]
    for name, tensor in tensors.items():
        side = 1 if name.endswith(BY_COLUMNS) else 0
        if name.startswith("tok_embeddings"):
            side = embedding_side
        cut = [tensor] * shards if tensor.ndim == 1 else tensor.chunk(shards, dim=side)
        for part, one in zip(parts, cut, strict=True):
            part[name] = one.clone()
    return parts


def write_meta(
    folder: Path,
    params: dict[str, Any],
    vocab: int,
    *,
    shards: int = 1,
    embedding_side: int = 0,
    tied: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """params.json and consolidated.*.pth; the tokenizer is given elsewhere."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.json").write_text(json.dumps(params))
    tensors = whole_tensors(params, vocab, tied, dtype)
    for index, part in enumerate(sliced(tensors, shards, embedding_side)):
        torch.save(part, folder / f"consolidated.{index:02d}.pth")
    return folder


def write_tokenizer(folder: Path, words: int = 90) -> Path:
    """A tokenizer of so many words, as a Hugging Face folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, words)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder
