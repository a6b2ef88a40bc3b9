"""The store of a model's frozen weights: inside its folder, or made once and kept in the cache."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Collection
from pathlib import Path

import torch

from llamaweft.errors import UserError
from llamaweft.files import check_recorded, locked
from llamaweft.model.folder import checked_tensors, read_config, shards
from llamaweft.model.llama import empty_causal_lm
from llamaweft.model.presets import LlamaConfig
from llamaweft.runtime import cache_dir
from llamaweft.weights.build import Source, random_source, write_store
from llamaweft.weights.codecs import codec_of, encoded_bytes
from llamaweft.weights.store import DamagedStoreError, Store

Progress = Callable[[int, int], None]
OWN = "store"
"""Name of the store inside a model folder that holds no safetensors (`model init`)."""


def open_store(folder: Path, codec: str) -> Store:
    """The store of the model in `folder`, made first where there is none yet.

    A store in the cache that is cut short, of another version or of another model is made again;
    one inside the model folder is all there is, so it is refused.

    Raises UserError for a folder whose own store has another codec, DamagedStoreError, and what
    `checked_tensors` and `write_store` raise.
    """
    if (own := folder / OWN).is_dir():
        store = Store(own)
        if store.codec != codec:
            raise UserError(
                f"{folder} holds its weights in {store.codec} only; set base_weights: {store.codec}"
            )
        return store
    target = cached_store(folder, codec)
    with locked(target.parent / f".{target.name}.lock"):  # a second process waits for the store
        if target.exists():
            try:
                store = Store(target)
                if store.index["source"] == origin(folder):
                    return store
            except DamagedStoreError:
                pass
            shutil.rmtree(target)
        _make(folder, codec, target)
        return Store(target)


def own_codec(folder: Path) -> str | None:
    """The codec of the store inside a model folder; None where there is none."""
    return Store(folder / OWN).codec if (folder / OWN).is_dir() else None


def cached_store(folder: Path, codec: str) -> Path:
    """Where the cache keeps the store of a model folder."""
    where = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    return cache_dir() / "stores" / f"{folder.resolve().name}-{where}-{codec}"


def origin(folder: Path) -> str:
    """What a store was made from: a digest of the config and of each file's name, size and time of
    change."""
    files = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in shards(folder)]
    config = (folder / "config.json").read_text(encoding="utf-8")
    return hashlib.sha256(json.dumps([files, config]).encode()).hexdigest()


def store_bytes(config: LlamaConfig, codec: str, without: Collection[str] = ()) -> int:
    """What a model's store will need on the disk, or what is held of it `without` these modules."""
    return sum(
        encoded_bytes(codec_of(name, codec, p.ndim), tuple(p.shape))
        for name, p in empty_causal_lm(config).named_parameters()
        if name.rpartition(".")[0] not in without
    )


def _make(folder: Path, codec: str, target: Path) -> None:
    check_recorded(folder)  # where it is what a run trained
    config = read_config(folder)
    sources = [
        Source(tensor.name, tensor.shape, tensor.chunks)
        for tensor in checked_tensors(folder, empty_causal_lm(config), config)
    ]
    write_store(target, codec, sources, origin(folder))


def random_sources(config: LlamaConfig, seed: int) -> list[Source]:
    """Random weights of a shape, as transformers initialises them."""
    generator = torch.Generator().manual_seed(seed)
    return [
        random_source(name, tuple(p.shape), config.initializer_range, generator)
        for name, p in empty_causal_lm(config).named_parameters()
    ]


def write_random_store(
    folder: Path, config: LlamaConfig, codec: str, seed: int, progress: Progress | None = None
) -> None:
    """A store of random weights inside a model folder that is being written."""
    sources = random_sources(config, seed)
    write_store(folder / OWN, codec, sources, f"random, seed {seed}", progress)
