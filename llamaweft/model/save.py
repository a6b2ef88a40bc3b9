"""Write a Hugging Face folder, shard by shard, without holding the model."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from llamaweft.errors import UserError
from llamaweft.model.presets import LlamaConfig

SHARD_BYTES = 2 * 10**9
"""A shard is closed once it holds this much; it bounds the memory that writing needs."""


@contextmanager
def written_aside(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its place, flushed to the disk, when all went
    well; otherwise nothing is left.

    Raises UserError when `folder` is there and not empty, cannot be written, or the disk is full.
    """
    if folder.is_file() or (folder.exists() and any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not empty; give a new folder")
    aside = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        yield aside
        _flush(aside)
        if folder.exists():
            folder.rmdir()
        aside.rename(folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _flush(folder: Path) -> None:
    """Onto the disk, so that the folder's new name never stands for missing bytes."""
    for path in folder.iterdir():
        if path.is_file():
            path.chmod(0o644)  # safetensors lets only the owner read
            with path.open("rb") as file:
                os.fsync(file.fileno())


def write_model(
    folder: Path,
    config: LlamaConfig,
    tensors: Iterable[tuple[str, Tensor]],
    save_tokenizer: Callable[[Path], Any],
    *,
    dtype: torch.dtype,
    stop_ids: Iterable[int] = (),
) -> None:
    """Write config, weights, generation config and tokenizer into an existing folder.

    tensors: name and value, taken one at a time. dtype: what they are written in.
    stop_ids: tokens that end an answer. Raises OSError.
    """
    # transformers 4 reads torch_dtype, 5 dtype.
    name = str(dtype).removeprefix("torch.")
    _write_json(folder / "config.json", config.to_dict() | {"torch_dtype": name, "dtype": name})
    stops = sorted(stop_ids)
    ids = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": stops[0] if len(stops) == 1 else stops or None,
        "pad_token_id": config.pad_token_id,
    }
    known = {key: value for key, value in ids.items() if value is not None}
    _write_json(folder / "generation_config.json", known)
    _write_shards(folder, ((key, tensor.to(dtype)) for key, tensor in tensors))
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
