"""From a Hugging Face folder with pickled weights (pytorch_model.bin) to one with safetensors."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from torch import Tensor

from llamaweft.errors import UserError
from llamaweft.files import need_disk, written_aside
from llamaweft.model.folder import indexed_files, is_no_weight, read_config
from llamaweft.model.llama import empty_causal_lm
from llamaweft.model.pickles import common_dtype, mapped_tensors
from llamaweft.model.presets import LlamaConfig
from llamaweft.model.save import write_model
from llamaweft.weights.build import Source

BIN, CONFIG = "pytorch_model.bin", "config.json"
INDEX = BIN + ".index.json"

DESCRIPTION = (".json", ".jinja", ".txt", "tokenizer.model")
"""How the names end of what is copied beside the weights; never code."""
WRITTEN_ANEW = (CONFIG, INDEX)


def bin_paths(folder: Path) -> list[Path]:
    """The pickled weights of a folder. Raises UserError where one that the index names is missing
    or outside the folder."""
    index = folder / INDEX
    return indexed_files(index, ".bin") if index.exists() else [folder / BIN]


def convert_bins(source: Path, folder: Path) -> None:
    """Write the same model with safetensors, every number and every other file as it is.

    Raises UserError for what `mapped_tensors` refuses, a tensor that is missing, left over, there
    twice or of another shape than config.json says, a disk that is too small, and a folder that is
    not empty.
    """
    config = read_config(source)
    tensors = _tensors(source, config)
    dtype = common_dtype(tensors.values())
    size = sum(tensor.numel() for tensor in tensors.values()) * dtype.itemsize
    need_disk(folder, size, f"{source} as safetensors")
    with written_aside(folder) as aside:
        write_model(
            aside,
            config,
            (_source(name, tensor) for name, tensor in tensors.items()),
            partial(_copy_description, source),
            dtype=dtype,
            stop_ids=config.stop_ids,
        )


def _copy_description(source: Path, folder: Path) -> None:
    for path in sorted(source.iterdir()):
        if path.name.endswith(DESCRIPTION) and path.name not in WRITTEN_ANEW:
            shutil.copyfile(path, folder / path.name)


def _tensors(source: Path, config: LlamaConfig) -> dict[str, Tensor]:
    """Every tensor of the model, once all are known to fit."""
    missing = {n: tuple(p.shape) for n, p in empty_causal_lm(config).named_parameters()}
    found: dict[str, Path] = {}
    tensors = {}
    for path in bin_paths(source):
        for name, tensor in mapped_tensors(path).items():
            if name in found:
                raise UserError(
                    f"{path} holds {name}, and so does {found[name]}; take the model's own files"
                )
            found[name] = path
            if is_no_weight(name, config):
                continue
            shape = missing.pop(name, None)
            if shape is None:
                raise UserError(
                    f"{path} holds {name}, which a {config.num_hidden_layers}-layer Llama does not "
                    "have; take the model's own files"
                )
            if tuple(tensor.shape) != shape:
                raise UserError(
                    f"{path}: {name} has shape {tuple(tensor.shape)}, but config.json says "
                    f"{shape}; take the model's own files"
                )
            tensors[name] = tensor.detach()
    if missing:
        raise UserError(
            f"{source} lacks the tensor {min(missing)} ({len(missing)} in all); "
            "download the model again"
        )
    return tensors


def _source(name: str, tensor: Tensor) -> Source:
    def chunks(rows: int) -> Iterable[Tensor]:
        return (tensor[start : start + rows] for start in range(0, len(tensor), rows))

    return Source(name, tuple(tensor.shape), chunks)
