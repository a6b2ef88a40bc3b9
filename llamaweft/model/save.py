"""Write a Hugging Face folder, shard by shard, without holding the model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from llamaweft.errors import UserError
from llamaweft.model.presets import LlamaConfig

SHARD_BYTES = 2 * 2**30
"""A shard is closed once it holds this much."""


@contextmanager
def written_aside(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its place when all went well; otherwise
    nothing is left. Raises UserError when `folder` is there and not empty, or the disk is full."""
    if folder.is_file() or (folder.exists() and any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not empty; give a new folder")
    aside = folder.with_name(f".{folder.name}.tmp")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        yield aside
        if folder.exists():
            folder.rmdir()
        aside.rename(folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_model(
    folder: Path,
    config: LlamaConfig,
    tensors: Iterable[tuple[str, Tensor]],
    save_tokenizer: Callable[[Path], Any],
    *,
    dtype: str,
    stop_ids: Iterable[int] = (),
) -> None:
    """Write config, weights, generation config and tokenizer into an existing folder.

    `tensors`: name and value, taken one at a time. `dtype`: theirs, as config.json names it.
    `stop_ids`: tokens that end an answer. Raises OSError.
    """
    config_json = config.to_dict() | {"torch_dtype": dtype, "dtype": dtype}
    (folder / "config.json").write_text(json.dumps(config_json, indent=2) + "\n")
    generation = {"bos_token_id": config.bos_token_id, "eos_token_id": sorted(stop_ids) or None}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    _write_shards(folder, tensors)
    save_tokenizer(folder)


def _write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    shards: list[Path] = []
    weight_map: dict[str, int] = {}
    pending: dict[str, Tensor] = {}
    total = 0

    def flush() -> None:
        if pending:
            shards.append(folder / f"shard-{len(shards)}")
            save_file(pending, shards[-1], metadata={"format": "pt"})
            pending.clear()

    for name, tensor in tensors:
        pending[name] = tensor.detach().cpu().contiguous()
        weight_map[name] = len(shards)
        total += tensor.nbytes
        if sum(t.nbytes for t in pending.values()) >= SHARD_BYTES:
            flush()
    flush()
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
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
