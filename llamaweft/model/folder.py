"""A model folder: where it is, its config, and its tensors, checked and read piece by piece."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from llamaweft.errors import UserError
from llamaweft.model.builtin import BUILTIN, builtin_folder
from llamaweft.model.gguf import convert_gguf
from llamaweft.model.presets import LlamaConfig
from llamaweft.runtime import cache_dir

DTYPE_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""What weights are read from: safetensors' name of a dtype -> torch's."""

_NOT_WEIGHTS = ("rotary_emb.inv_freq",)


def find_folder(name: str) -> Path:
    """The Hugging Face folder behind what a recipe calls `model`.

    A folder is itself; `builtin:` models and .gguf files are converted once into the cache; else
    the name is a hub id and is downloaded. Raises UserError when there is no such model.
    """
    if name.startswith("builtin:"):
        return builtin_folder(name)
    path = Path(name)
    if path.suffix == ".gguf":
        return _converted(path)
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"the model {name} is a file that is no .gguf; give a folder or a hub id")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"there is no model folder {name}; check the path in the recipe")
    return _downloaded(name)


def base_name(model: str, folder: Path) -> str:
    """What an adapter calls its base: an absolute path, or the hub id."""
    is_hub_id = not (model.startswith("builtin:") or Path(model).exists())
    return model if is_hub_id else str(folder.resolve())


def _converted(path: Path) -> Path:
    if not path.is_file():
        raise UserError(f"there is no file {path}; check the path in the recipe")
    facts = f"{path.resolve()} {path.stat().st_size} {path.stat().st_mtime_ns}"
    digest = hashlib.sha256(facts.encode()).hexdigest()[:16]
    folder = cache_dir() / "models" / f"{path.stem}-{digest}"
    if not folder.exists():
        convert_gguf(path, folder)
    return folder


def _downloaded(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError

    wanted = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except GatedRepoError:
        raise UserError(
            f"the model {name} needs its licence accepted: do so on its page of the hub, then log "
            "in with `hf auth login`"
        ) from None
    except Exception as error:  # the hub's client raises many kinds for no network, no such id
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        builtin = ", ".join(BUILTIN)
        raise UserError(
            f"the model {name} is no folder here and cannot be fetched from the hub ({reason}); "
            f"give a folder, a .gguf file or {builtin}"
        ) from None


def read_config(folder: Path) -> LlamaConfig:
    """The config.json of a model folder. Raises UserError when it is missing or unusable."""
    path = folder / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} is no model folder: it has no config.json") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
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
    for tensor in tensor_files(folder):
        name = tensor.name
        expected = missing.pop(name, None)
        if expected is None:
            if name.endswith(_NOT_WEIGHTS) or (
                name == "lm_head.weight" and config.tie_word_embeddings
            ):
                continue
            raise UserError(
                f"{tensor.path} holds {name}, which a {config.num_hidden_layers}-layer "
                "Llama does not have (or twice); take the model's own files"
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


def tensor_files(folder: Path) -> Iterator[TensorFile]:
    """Every tensor of a folder of safetensors, unread.

    Raises UserError for a missing or truncated file and for a dtype that holds no plain weights.
    """
    for path in shards(folder):
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
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
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError:
        raise UserError(f"{path} is missing; download the model again") from None
    except SafetensorError as error:
        raise UserError(f"{path} is cut short or damaged ({error}); download it again") from None


def shards(folder: Path) -> list[Path]:
    """The safetensors files of a model folder. Raises UserError where one is missing."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        if not (folder / "model.safetensors").exists():
            raise UserError(f"{folder} holds no model.safetensors; download the model again")
        return [folder / "model.safetensors"]
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{index} cannot be read; download the model again") from None
    for name in names:
        if Path(name).name != name:
            raise UserError(f"{index} names a file outside its folder: {name}")
        if not (folder / name).exists():
            raise UserError(f"{folder / name} is missing; download the model again")
    return [folder / name for name in names]
