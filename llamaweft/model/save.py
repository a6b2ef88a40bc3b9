"""Write a Hugging Face folder, shard by shard, without holding the model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from llamaweft.model.presets import LlamaConfig

SHARD_BYTES = 2 * 10**9
"""A shard is closed once it holds this much; it bounds the memory that writing needs."""


def write_model(
    folder: Path,
    config: LlamaConfig,
    tensors: Iterable[tuple[str, Tensor]],
    save_tokenizer: Callable[[Path], Any],
    *,
    dtype: torch.dtype,
    stop_ids: Iterable[int] = (),
    more: dict[str, Any] | None = None,
) -> None:
    """Write config, weights, generation config and tokenizer into an existing folder.

    tensors: name and value, taken one at a time. dtype: what they are written in.
    stop_ids: tokens that end an answer. more: further keys of config.json. Raises OSError.
    """
    # transformers 4 reads torch_dtype, 5 dtype.
    name = str(dtype).removeprefix("torch.")
    names = {"torch_dtype": name, "dtype": name}
    write_description(folder, config, save_tokenizer, stop_ids, names | (more or {}))
    _write_shards(folder, ((key, tensor.to(dtype)) for key, tensor in tensors))


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


def _write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """model.safetensors, or shards and model.safetensors.index.json as transformers names them."""
    shards: list[Path] = []
    weight_map: dict[str, int] = {}
    pending: dict[str, Tensor] = {}
    held = total = 0

    def close_shard() -> None:
        nonlocal held
        shards.append(folder / f"shard-{len(shards)}")
        save_file(pending, shards[-1], metadata={"format": "pt"})
        pending.clear()
        held = 0

    for name, tensor in tensors:
        if pending and held + tensor.nbytes > SHARD_BYTES:
            close_shard()
        pending[name] = tensor.detach().cpu().contiguous()
        weight_map[name] = len(shards)
        held += tensor.nbytes
        total += tensor.nbytes
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


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
