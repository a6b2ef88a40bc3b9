"""Load a model: find its folder, check its files, and place tensor after tensor.

The model is built without memory, and each tensor is read and cast alone, so the peak is the
model once and one tensor.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from llamaweft.errors import UserError
from llamaweft.model.builtin import BUILTIN, builtin_folder
from llamaweft.model.gguf import convert_gguf
from llamaweft.model.llama import LlamaForCausalLM
from llamaweft.model.presets import LlamaConfig
from llamaweft.runtime import cache_dir

_READABLE = (torch.float32, torch.bfloat16, torch.float16)
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


def load_causal_lm(
    folder: Path,
    *,
    frozen_dtype: torch.dtype | None,
    compute_dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> LlamaForCausalLM:
    """A causal model from a folder of safetensors.

    frozen_dtype: every matrix is frozen and held in it; None: everything is trained, in fp32.
    Norms are always fp32. Raises UserError for a missing, truncated or left-over shard or
    tensor, a wrong shape and a wrong dtype.
    """
    model = empty_causal_lm(read_config(folder))
    missing = set(_own_names(model))
    for where, name, tensor in read_tensors(folder):
        if name not in missing:
            if name.endswith(_NOT_WEIGHTS) or (name == "lm_head.weight" and _is_tied(model)):
                continue
            raise UserError(
                f"{where} holds {name}, which a {model.config.num_hidden_layers}-layer "
                "Llama does not have (or twice); take the model's own files"
            )
        expected = model.get_parameter(name).shape
        if tensor.shape != expected:
            raise UserError(
                f"{where}: {name} has shape {tuple(tensor.shape)}, but config.json says "
                f"{tuple(expected)}; take the model's own files"
            )
        place_tensor(model, name, tensor, frozen_dtype, device)
        missing.remove(name)
    if missing:
        raise UserError(
            f"{folder} lacks the tensor {min(missing)} ({len(missing)} in all); "
            "download the model again"
        )
    model.tie_weights()
    model.model.compute_dtype = compute_dtype
    return model


def empty_causal_lm(config: LlamaConfig) -> LlamaForCausalLM:
    """The modules without memory for their weights."""
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def place_tensor(
    model: nn.Module,
    name: str,
    tensor: Tensor,
    frozen_dtype: torch.dtype | None,
    device: torch.device | str,
) -> None:
    """Make `tensor` the parameter `name`: trained in fp32, or frozen (vectors in fp32)."""
    frozen = frozen_dtype is not None
    dtype = frozen_dtype if frozen_dtype is not None and tensor.ndim > 1 else torch.float32
    parent, _, attribute = name.rpartition(".")
    # A copy, since a tensor read from a file may be the file's own pages.
    value = tensor.to(device=device, dtype=dtype, copy=True)
    parameter = nn.Parameter(value, requires_grad=not frozen)
    setattr(model.get_submodule(parent), attribute, parameter)


def read_tensors(folder: Path) -> Iterator[tuple[Path, str, Tensor]]:
    """Every tensor of a folder with the file it is in, one at a time.

    Raises UserError for a missing or truncated file and for a dtype that holds no plain weights.
    """
    for path in _shards(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    tensor = file.get_tensor(name)
                    if tensor.dtype not in _READABLE:
                        raise UserError(
                            f"{path}: {name} holds {tensor.dtype}, and weights are read from "
                            "float32, bfloat16 or float16; take the unquantised model"
                        )
                    yield path, name, tensor
        except FileNotFoundError:
            raise UserError(f"{path} is missing; download the model again") from None
        except SafetensorError as error:
            raise UserError(
                f"{path} is cut short or damaged ({error}); download it again"
            ) from None


def _shards(folder: Path) -> list[Path]:
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


def _is_tied(model: LlamaForCausalLM) -> bool:
    return model.config.tie_word_embeddings


def _own_names(model: LlamaForCausalLM) -> list[str]:
    """Names of the parameters that files must hold; a tied head is the embedding."""
    return [name for name, _ in model.named_parameters()]


def random_tensors(config: LlamaConfig, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Random fp32 weights of a shape, one tensor at a time, as transformers initialises them:
    matrices normal with `initializer_range`, norms one."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in empty_causal_lm(config).named_parameters():
        if parameter.ndim == 1:
            yield name, torch.ones(parameter.shape)
        else:
            value = torch.empty(parameter.shape)
            yield name, value.normal_(0, config.initializer_range, generator=generator)
