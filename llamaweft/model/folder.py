"""A model folder: its config, and its tensors, checked and read piece by piece."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from llamaweft.errors import UserError
from llamaweft.model.presets import LlamaConfig

DTYPE_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""What weights are read from: safetensors' name of a dtype -> torch's."""

_NOT_WEIGHTS = ("rotary_emb.inv_freq",)


def read_config(folder: Path) -> LlamaConfig:
    """The config.json of a model folder. Raises UserError when it is missing or unusable."""
    path = folder / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} is no model folder: it has no config.json") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is no object; take the model's own config.json")
    return LlamaConfig.from_dict(content, str(path))


@dataclass(frozen=True)
class TensorFile:
    """A tensor of a model folder, and where it is read from."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    """In safetensors' names: F32, BF16, F16."""

    def read(self) -> Tensor:
        """All of it."""
        return next(iter(self.chunks(self.shape[0])))

    def mapped(self) -> Tensor:
        """All of it as the file's own pages, which take no memory of the process; for reading only.
        Raises UserError for a damaged file."""
        with _opened(self.path) as file:
            found: Tensor = file.get_tensor(self.name)
            return found

    @contextmanager
    def opened(self) -> Iterator[Callable[[int, int], Tensor]]:
        """What gives the rows [start, stop). Raises UserError for a damaged file."""
        with _opened(self.path) as file:
            part = file.get_slice(self.name)
            yield lambda start, stop: part[start:stop]

    def chunks(self, rows: int) -> Iterator[Tensor]:
        """`rows` rows at a time. Raises UserError for a damaged file."""
        with self.opened() as part:
            for start in range(0, self.shape[0], rows):
                yield part(start, start + rows)


def checked_tensors(folder: Path, model: nn.Module, config: LlamaConfig) -> Iterator[TensorFile]:
    """The tensors that `model`, built from `config`, needs: each found once and of its shape.

    Raises UserError for one that is missing, left over, of another shape or another dtype.
    """
    missing = {name: parameter.shape for name, parameter in model.named_parameters()}
    found: dict[str, Path] = {}
    for tensor in tensor_files(folder):
        name = tensor.name
        if name in found:
            raise UserError(
                f"{tensor.path} holds {name}, and so does {found[name]}; take the model's own files"
            )
        found[name] = tensor.path
        if is_no_weight(name, config):
            continue
        expected = missing.pop(name, None)
        if expected is None:
            raise UserError(
                f"{tensor.path} holds {name}, which a {config.num_hidden_layers}-layer "
                "Llama does not have; take the model's own files"
            )
        if tensor.shape != expected:
            raise UserError(
                f"{tensor.path}: {name} has shape {tensor.shape}, but config.json says "
                f"{tuple(expected)}; take the model's own files"
            )
        yield tensor
    if missing:
        raise UserError(
            f"{folder} lacks the tensor {min(missing)} ({len(missing)} in all); "
            "download the model again"
        )


def is_no_weight(name: str, config: LlamaConfig) -> bool:
    """Whether a file may hold this beside the weights: it says again what is known without it."""
    return name.endswith(_NOT_WEIGHTS) or (name == "lm_head.weight" and config.tie_word_embeddings)


def tensor_files(folder: Path) -> Iterator[TensorFile]:
    """Every tensor of a folder of safetensors, unread.

    Raises UserError for a missing or truncated file and for a dtype that holds no plain weights.
    """
    for path in shards(folder):
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                if not name.isprintable():
                    raise UserError(
                        f"{path} holds the name {name[:80]!r}, which cannot be shown; take the "
                        "model's own files"
                    )
                part = file.get_slice(name)
                dtype = part.get_dtype()
                if dtype not in DTYPE_NAMES:
                    raise UserError(
                        f"{path}: {name} holds {dtype}, and weights are read from "
                        f"{', '.join(DTYPE_NAMES)}; take the unquantised model"
                    )
                yield TensorFile(path, name, tuple(part.get_shape()), dtype)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    damaged = "is cut short or damaged"
    try:
        opened = safe_open(path, framework="pt")
    except FileNotFoundError:
        raise UserError(f"{path} is missing; download the model again") from None
    except SafetensorError as error:
        raise UserError(f"{path} {damaged} ({error}); download it again") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); download it again") from None
    try:
        with opened as file:
            yield file
    except SafetensorError as error:
        raise UserError(f"{path} {damaged} ({error}); download it again") from None


def shards(folder: Path) -> list[Path]:
    """The safetensors files of a model folder. Raises UserError where one is missing."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return indexed_files(index, ".safetensors")
    if not (folder / "model.safetensors").exists():
        raise UserError(f"{folder} holds no model.safetensors; download the model again")
    return [folder / "model.safetensors"]


def indexed_files(index: Path, ending: str) -> list[Path]:
    """The files that the index of a model in several files names, which end in `ending`.

    Raises UserError for an index that cannot be read, that names a file of another kind or one
    outside its folder, and for a file that is missing.
    """
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{index} cannot be read; download the model again") from None
    if not names:
        raise UserError(f"{index} names no file; download the model again")
    for name in names:
        if not isinstance(name, str) or not name.endswith(ending):
            raise UserError(f"{index} names {name!r}, which is no {ending} file; take another")
        # A name that stays one on every system: Windows has more marks for folders.
        if PureWindowsPath(name).name != name:
            raise UserError(f"{index} names a file outside its folder: {name}; take another")
        if not (index.parent / name).exists():
            raise UserError(f"{index.parent / name} is missing; download the model again")
    return [index.parent / name for name in names]
