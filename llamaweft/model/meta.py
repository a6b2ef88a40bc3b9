"""From Meta's own layout to a Hugging Face folder.

The layout: params.json, tokenizer.model, and the weights in consolidated.00.pth or, for a model
that was trained on several GPUs at once, in consolidated.00.pth to consolidated.NN.pth, each with a
slice of every matrix. Which side is sliced: fairscale's column, row and vocabulary parallel layers
in Meta's llama-models, llama3/model.py; Llama 1 and 2 slice the embedding by columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamaweft.errors import UserError
from llamaweft.files import need_disk, written_aside
from llamaweft.model.gguf import split_halves
from llamaweft.model.llama import empty_causal_lm
from llamaweft.model.meta_config import meta_config
from llamaweft.model.pickles import common_dtype, mapped_tensors
from llamaweft.model.presets import LlamaConfig, parameter_count
from llamaweft.model.save import write_model
from llamaweft.model.tokenizer import load_tokenizer
from llamaweft.weights.build import Source

ROWS, COLUMNS, WHOLE = 0, 1, None
"""Which side of a matrix the shards hold slices of; norms are whole in every one."""

EMBEDDING, HEAD = "tok_embeddings.weight", "output.weight"
TOP_NAMES = {
    EMBEDDING: ("model.embed_tokens.weight", ROWS),
    "norm.weight": ("model.norm.weight", WHOLE),
    HEAD: ("lm_head.weight", ROWS),
}
LAYER_NAMES = {
    "attention.wq.weight": ("self_attn.q_proj.weight", ROWS),
    "attention.wk.weight": ("self_attn.k_proj.weight", ROWS),
    "attention.wv.weight": ("self_attn.v_proj.weight", ROWS),
    "attention.wo.weight": ("self_attn.o_proj.weight", COLUMNS),
    "feed_forward.w1.weight": ("mlp.gate_proj.weight", ROWS),
    "feed_forward.w2.weight": ("mlp.down_proj.weight", COLUMNS),
    "feed_forward.w3.weight": ("mlp.up_proj.weight", ROWS),
    "attention_norm.weight": ("input_layernorm.weight", WHOLE),
    "ffn_norm.weight": ("post_attention_layernorm.weight", WHOLE),
}
NOT_WEIGHTS = "rope.freqs"
"""Rotary frequencies, which Llama 1 and 2 keep beside the weights."""

LLAMA3_ENDS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
"""Every token that ends a text of Llama 3, as in transformers' configs of its instruct models."""

Shards = dict[Path, dict[str, Tensor]]
"""The tensors of each file, by Meta's names, in the order of the files."""


def shard_paths(source: Path) -> list[Path]:
    """The weights in one of Meta's folders. Raises UserError where one of several is missing."""
    paths = sorted(source.glob("consolidated.*.pth"))
    for index, path in enumerate(paths):
        expected = source / f"consolidated.{index:02d}.pth"
        if path != expected:
            raise UserError(f"{expected} is missing; download the model again")
    return paths


def convert_meta(source: Path, folder: Path, tokenizer: str | None = None) -> None:
    """Write the model in one of Meta's folders as a Hugging Face folder, every number as it is.

    tokenizer: as `load_tokenizer` takes it; None: the tokenizer.model beside the weights, or one
    folder above. Peak memory: a chunk of rows, or one query matrix.

    Raises UserError for what `mapped_tensors`, `meta_config` and `load_tokenizer` refuse, a shard
    or tensor that is missing, left over or of another shape, a disk that is too small, and a folder
    that is not empty.
    """
    shards = {path: mapped_tensors(path) for path in shard_paths(source)}
    loaded = _tokenizer(source, tokenizer)
    tied = _is_tied(shards)
    vocabulary, embedding_side = _embedding(shards, source)
    config = meta_config(source, vocabulary, tied, loaded.bos_token_id, _end_ids(loaded))
    loaded.model_max_length = config.max_position_embeddings
    sources = _sources(shards, config, embedding_side, source)
    if len(loaded) > vocabulary:
        raise UserError(
            f"the tokenizer has {len(loaded)} tokens and the model in {source} {vocabulary}; give "
            "the model's own"
        )
    weights = [t for held in shards.values() for name, t in held.items() if name != NOT_WEIGHTS]
    dtype = common_dtype(weights)
    size = parameter_count(config) * dtype.itemsize
    need_disk(folder, size, f"the model converted from {source}")
    with written_aside(folder) as aside:
        write_model(
            aside,
            config,
            sources,
            loaded.save_pretrained,
            dtype=dtype,
            stop_ids=config.stop_ids,
        )


def _tokenizer(source: Path, name: str | None) -> Any:
    if name is not None:
        return load_tokenizer(name)
    found = [p for p in (source, source.parent) if (p / "tokenizer.model").is_file()]
    give = f"`llamaweft model convert {source} DIR --tokenizer T`, T its hub id or folder"
    if not found:
        raise UserError(f"{source} holds no tokenizer.model; give the model's tokenizer: {give}")
    try:
        return load_tokenizer(found[0] / "tokenizer.model")
    except UserError:
        raise UserError(
            f"{found[0] / 'tokenizer.model'} is not Llama 3's; give the model's tokenizer in "
            f"another form: {give}"
        ) from None


def _end_ids(tokenizer: Any) -> list[int]:
    known = tokenizer.get_vocab()
    llama3 = sorted(known[name] for name in LLAMA3_ENDS if name in known)
    if llama3 or tokenizer.eos_token_id is None:
        return llama3
    return [int(tokenizer.eos_token_id)]


def _is_tied(shards: Shards) -> bool:
    """Whether the head is the embedding: Meta's files leave it out, or hold the same numbers."""
    for held in shards.values():
        embedding, head = held.get(EMBEDDING), held.get(HEAD)
        if head is not None and (embedding is None or not _equal(embedding, head)):
            return False
    return True


def _equal(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return one.data_ptr() == other.data_ptr() or torch.equal(one, other)


def _embedding(shards: Shards, source: Path) -> tuple[int, int]:
    """How many rows the embedding has, and which side of it is sliced."""
    path, held = next(iter(shards.items()))
    embedding, norm = held.get(EMBEDDING), held.get("norm.weight")
    if embedding is None or norm is None:
        lacking = EMBEDDING if embedding is None else "norm.weight"
        raise UserError(f"{path} lacks the tensor {lacking}; download the model again")
    if embedding.ndim != 2 or norm.ndim != 1:
        raise UserError(f"{path} holds no Llama model: {EMBEDDING} is no matrix; give another")
    if embedding.shape[1] == norm.shape[0]:
        return embedding.shape[0] * len(shards), ROWS
    return embedding.shape[0], COLUMNS


def _sources(
    shards: Shards, config: LlamaConfig, embedding_side: int, source: Path
) -> list[Source]:
    """Every tensor of the model, once all shards are known to hold their part of it."""
    if config.num_key_value_heads % len(shards):
        raise UserError(
            f"{source} holds {len(shards)} shards for {config.num_key_value_heads} key-value "
            "heads, which do not share out evenly; give the model's Hugging Face folder"
        )
    shapes = {n: tuple(p.shape) for n, p in empty_causal_lm(config).named_parameters()}
    names = _names(config)
    known = {*names, HEAD, NOT_WEIGHTS}
    for path, held in shards.items():
        if unknown := sorted(held.keys() - known):
            raise UserError(
                f"{path} holds {unknown[0]}, which is not part of a Llama model of "
                f"{config.num_hidden_layers} layers; give a plain Llama model"
            )
    sources = []
    for name, (ours, side) in names.items():
        side = embedding_side if name == EMBEDDING else side
        parts = _parts(shards, name, shapes[ours], side)
        heads = {
            "attention.wq.weight": config.num_attention_heads,
            "attention.wk.weight": config.num_key_value_heads,
        }.get(name.split(".", 2)[-1])
        sources.append(_source(ours, shapes[ours], parts, side, heads))
    return sources


def _names(config: LlamaConfig) -> dict[str, tuple[str, int | None]]:
    """Meta's name of each tensor -> Hugging Face's, and which side of it is sliced."""
    names: dict[str, tuple[str, int | None]] = {EMBEDDING: TOP_NAMES[EMBEDDING]}
    for layer in range(config.num_hidden_layers):
        for name, (ours, side) in LAYER_NAMES.items():
            names[f"layers.{layer}.{name}"] = (f"model.layers.{layer}.{ours}", side)
    names["norm.weight"] = TOP_NAMES["norm.weight"]
    if not config.tie_word_embeddings:
        names[HEAD] = TOP_NAMES[HEAD]
    return names


def _parts(shards: Shards, name: str, shape: tuple[int, ...], side: int | None) -> list[Tensor]:
    """A tensor's slices in order; of what is whole in every shard the first.

    Raises UserError for a slice that is missing or has another shape.
    """
    expected = list(shape)
    if side is not None:
        expected[side] //= len(shards)
    parts = []
    for path, held in shards.items():
        if name not in held:
            raise UserError(f"{path} lacks the tensor {name}; download the model again")
        part = held[name].detach()
        wanted = side is None or expected[side] * len(shards) == shape[side]
        if not wanted or list(part.shape) != expected:
            raise UserError(
                f"{path}: {name} has shape {tuple(part.shape)}, but params.json says {shape} in "
                f"{len(shards)} shards; take the model's own files"
            )
        parts.append(part)
    return parts if side is not None else parts[:1]


def _source(
    name: str, shape: tuple[int, ...], parts: list[Tensor], side: int | None, heads: int | None
) -> Source:
    """A tensor put together from its slices a few rows at a time. heads: those of a matrix whose
    rows are turned by rotary positions, neighbouring ones at Meta's, (i, i + D/2) here."""

    def chunks(rows: int) -> Iterable[Tensor]:
        if heads is not None:
            return _in_rows([split_halves(torch.cat(parts), heads)], rows)
        if side == COLUMNS:
            return _side_by_side(parts, rows)
        return _in_rows(parts, rows)

    return Source(name, shape, chunks)


def _in_rows(parts: list[Tensor], rows: int) -> Iterator[Tensor]:
    for part in parts:
        for start in range(0, part.shape[0], rows):
            yield part[start : start + rows]


def _side_by_side(parts: list[Tensor], rows: int) -> Iterator[Tensor]:
    for start in range(0, parts[0].shape[0], rows):
        yield torch.cat([part[start : start + rows] for part in parts], dim=1)
