"""Write a Hugging Face folder, shard by shard, without holding the model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamaweft.model.presets import LlamaConfig
from llamaweft.weights.build import Source, rows_at_once
from llamaweft.weights.store import SAFETENSORS_DTYPES

SHARD_BYTES = 2 * 10**9
"""A shard is closed once it holds this much. Of tensors that are given whole, so much is held in
memory; of sources a few rows."""


def write_model(
    folder: Path,
    config: LlamaConfig,
    tensors: Iterable[tuple[str, Tensor] | Source],
    save_tokenizer: Callable[[Path], Any],
    *,
    dtype: torch.dtype,
    stop_ids: Iterable[int] = (),
    more: dict[str, Any] | None = None,
) -> None:
    """Write config, weights, generation config and tokenizer into an existing folder.

    tensors: name and value, or a source of rows, taken one at a time. dtype: of what is written.
    stop_ids: tokens that end an answer. more: further keys of config.json. Raises OSError.
    """
    # transformers 4 reads torch_dtype, 5 dtype.
    name = str(dtype).removeprefix("torch.")
    names = {"torch_dtype": name, "dtype": name}
    write_description(folder, config, save_tokenizer, stop_ids, names | (more or {}))
    sources = (one if isinstance(one, Source) else _held(*one, dtype) for one in tensors)
    _write_shards(folder, sources, dtype)


def write_description(
    folder: Path,
    config: LlamaConfig,
    save_tokenizer: Callable[[Path], Any],
    stop_ids: Iterable[int],
    more: dict[str, Any] | None = None,
) -> None:
    """Everything of a model folder but its weights. more: further keys of config.json."""
    _write_json(folder / "config.json", config.to_dict() | (more or {}))
    stops = sorted(stop_ids)
    ids = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": stops[0] if len(stops) == 1 else stops or None,
        "pad_token_id": config.pad_token_id,
    }
    known = {key: value for key, value in ids.items() if value is not None}
    _write_json(folder / "generation_config.json", known)
    save_tokenizer(folder)


def _held(name: str, tensor: Tensor, dtype: torch.dtype) -> Source:
    held = tensor.detach().to(device="cpu", dtype=dtype)
    return Source(name, tuple(held.shape), lambda rows: [held])


def _write_shards(folder: Path, sources: Iterable[Source], dtype: torch.dtype) -> None:
    """model.safetensors, or shards and model.safetensors.index.json as transformers names them."""
    shards: list[Path] = []
    weight_map: dict[str, int] = {}
    pending: list[Source] = []
    held = total = 0

    def close_shard() -> None:
        nonlocal held
        shards.append(folder / f"shard-{len(shards)}")
        _write_safetensors(shards[-1], pending, dtype)
        pending.clear()
        held = 0

    for source in sources:
        size = math.prod(source.shape) * dtype.itemsize
        if pending and held + size > SHARD_BYTES:
            close_shard()
        pending.append(source)
        weight_map[source.name] = len(shards)
        held += size
        total += size
    close_shard()
    if len(shards) == 1:
        shards[0].rename(folder / "model.safetensors")
        return
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for shard, name in zip(shards, names, strict=True):
        shard.rename(folder / name)
    index = {
        "metadata": {"total_size": total},
        "weight_map": {tensor: names[shard] for tensor, shard in weight_map.items()},
    }
    _write_json(folder / "model.safetensors.index.json", index)


def _write_safetensors(path: Path, sources: list[Source], dtype: torch.dtype) -> None:
    """One file, a few rows at a time: the length of its header, the header, the numbers
    (the format of safetensors). The library itself wants all of a file's tensors in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for source in sources:
        start, end = end, end + math.prod(source.shape) * dtype.itemsize
        kind = SAFETENSORS_DTYPES[dtype]
        header[source.name] = {"dtype": kind, "shape": source.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for source in sources:
            for part in source.chunks(rows_at_once(source.shape)):
                values = part.detach().to(device="cpu", dtype=dtype).contiguous()
                file.write(values.reshape(-1).view(torch.uint8).numpy().data)
        written = file.tell() - 8 - len(text)
    assert written == end, f"{path}: {written} bytes of numbers, and the header says {end}"


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
