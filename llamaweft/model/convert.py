"""Models in other forms, written as Hugging Face folders: when asked to, or once into the cache."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

from llamaweft.errors import UserError
from llamaweft.files import locked
from llamaweft.model.bins import BIN, bin_paths, convert_bins
from llamaweft.model.bins import INDEX as BIN_INDEX
from llamaweft.model.gguf import convert_gguf
from llamaweft.model.meta import convert_meta, shard_paths
from llamaweft.model.meta_config import PARAMS
from llamaweft.runtime import cache_dir

CONVERTER_FORMAT = 1
"""Raised when a conversion writes something else, so that no old folder is used."""

Form = Literal["gguf", "meta", "bins"]


def form_of(path: Path) -> Form | None:
    """What a model has to be converted from: a .gguf file, Meta's layout, or a folder whose weights
    are only there as pytorch_model.bin. None for everything else."""
    if path.suffix == ".gguf":
        return "gguf"
    if not path.is_dir() or any(path.glob("model*.safetensors")):
        return None
    if next(path.glob("consolidated.*.pth"), None) is not None:
        return "meta"
    if (path / BIN).exists() or (path / BIN_INDEX).exists():
        return "bins"
    return None


def convert(source: Path, folder: Path, tokenizer: str | None = None) -> None:
    """Write the model in `source` as a Hugging Face folder. tokenizer: of a model in Meta's layout,
    where it is not beside the weights.

    Raises UserError for what there is nothing to convert in, for a tokenizer that would be ignored,
    and as `convert_gguf`, `convert_meta` and `convert_bins` do.
    """
    form = form_of(source)
    if form is None and not source.exists():
        raise UserError(f"there is no {source}; give a .gguf file or a model's folder")
    if form is None:
        raise UserError(
            f"{source} is no .gguf file and holds no consolidated.00.pth or {BIN}, so there is "
            "nothing to convert; a folder of safetensors is used as it is"
        )
    if tokenizer is not None and form != "meta":
        raise UserError(f"{source} has its own tokenizer; remove --tokenizer {tokenizer}")
    if form == "gguf":
        convert_gguf(source, folder)
    elif form == "meta":
        convert_meta(source, folder, tokenizer)
    else:
        convert_bins(source, folder)


def converted(source: Path) -> Path:
    """The Hugging Face folder that `source` was converted to, in the cache; made where it is not
    there yet, or where `source` has changed. A second process that asks waits for the first.

    Raises UserError as `convert`.
    """
    files = _files(source)
    facts = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    digest = hashlib.sha256(repr((CONVERTER_FORMAT, facts)).encode()).hexdigest()[:16]
    models = cache_dir() / "models"
    folder = models / f"{source.resolve().stem}-{digest}"
    if not folder.exists():
        with locked(models / f".{folder.name}.lock"):
            if not folder.exists():
                convert(source, folder)
    return folder


def _files(source: Path) -> list[Path]:
    """Everything that a conversion reads."""
    if source.suffix == ".gguf":
        if not source.is_file():
            raise UserError(f"there is no file {source}; check the path in the recipe")
        return [source]
    weights = shard_paths(source) if form_of(source) == "meta" else bin_paths(source)
    described = ("config.json", PARAMS, "tokenizer.model", "tokenizer.json")
    more = [source / name for name in described] + [source.parent / "tokenizer.model"]
    for path in weights:
        if not path.exists():
            raise UserError(f"{path} is missing; download the model again")
    return [*weights, *(path for path in more if path.is_file())]
