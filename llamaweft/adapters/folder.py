"""The adapter folder: adapter_config.json and adapter_model.safetensors, exactly as PEFT's."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llamaweft.adapters.lora import DoraLinear, LoraConfig, PissaLinear, lora_layers
from llamaweft.adapters.token_rows import INDICES, token_indices, token_rows
from llamaweft.adapters.whole import modules_to_save, peft_names
from llamaweft.errors import UserError
from llamaweft.files import check_recorded
from llamaweft.weights.grown import ROWS

HEADS = ("score", "qa_outputs")
"""Modules that an adapter folder may hold whole, by their names in transformers."""

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


Whole = Callable[[str, Tensor], Tensor]
"""A parameter's name and what this process holds of it -> all of it."""


def adapter_state(model: nn.Module, whole: Whole = lambda name, held: held) -> dict[str, Tensor]:
    """The trained tensors under PEFT's names; of PiSSA copies, with where it started."""
    state = {}
    for name, layer in lora_layers(model).items():
        a_RI, b_OR = (whole(f"{name}.{h}", getattr(layer, h).detach()) for h in HALVES)
        pair = a_RI, b_OR
        if isinstance(layer, PissaLinear):
            pair = layer.stacked()
        for half, tensor in zip(_PAIR, pair, strict=True):
            state[f"base_model.model.{name}.{half}"] = tensor
        if isinstance(layer, DoraLinear):
            state[f"base_model.model.{name}.lora_magnitude_vector"] = (
                layer.lora_magnitude_vector.detach()
            )
    for head in modules_to_save(model):
        for name, tensor in model.get_submodule(head).named_parameters():
            state[f"base_model.model.{head}.{name}"] = tensor.detach()
    return state | token_rows(model)


def load_adapter_state(model: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Copy tensors under PEFT's names into the adapted layers and what is trained whole.

    Raises UserError when a tensor is missing, left over or of another shape, or where embedding and
    head differ and the model has one matrix for both.
    """
    own, filled = adapter_state(model), dict[int, str]()
    if unknown := sorted(state.keys() ^ own.keys()):
        raise UserError(
            f"{where} does not fit this model: {unknown[0]} is on one side only "
            f"({len(unknown)} such tensors); use the base model it was trained on"
        )
    for name, tensor in own.items():
        if tensor.shape != state[name].shape:
            raise UserError(
                f"{where}: {name} has shape {tuple(state[name].shape)}, this model needs "
                f"{tuple(tensor.shape)}; use the base model it was trained on"
            )
        if not state[name].is_floating_point():
            raise UserError(
                f"{where}: {name} holds {state[name].dtype}; take the adapter's own file"
            )
        first = filled.setdefault(tensor.data_ptr(), name)
        if not torch.equal(state[first], state[name]):
            raise UserError(
                f"{where}: {first} and {name} differ, and the base model has one matrix for both; "
                "merge the adapter with what trained it, and use that as the model"
            )
        with torch.no_grad():
            tensor.copy_(state[name])
    for name, layer in lora_layers(model).items():
        if isinstance(layer, PissaLinear):
            layer.unstack(*(state[f"base_model.model.{name}.{half}"] for half in _PAIR))


def save_adapter(
    model: nn.Module,
    config: LoraConfig,
    base: str,
    folder: Path,
    revision: str | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the adapter folder. `base`: absolute path or hub id of the base model, which PEFT
    opens under `base_model_name_or_path`; revision: its commit on the hub. state: the tensors as
    `adapter_state` gives them, where the model does not hold them whole."""
    config = config.saved
    folder.mkdir(parents=True, exist_ok=True)
    held, seen = adapter_state(model) if state is None else state, set[int]()
    state = {}
    for name, tensor in held.items():
        shared = tensor.data_ptr() in seen  # of a tied matrix safetensors wants two copies
        seen.add(tensor.data_ptr())
        state[name] = tensor.clone() if shared else tensor.cpu().contiguous()
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    content: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": getattr(model, "peft_task", "CAUSAL_LM"),
        "base_model_name_or_path": base,
        "revision": revision,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "target_modules": list(config.target_modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": peft_names(model) or None,
        INDICES: token_indices(model),
    }
    (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n")


def read_adapter(folder: Path) -> tuple[LoraConfig, str, dict[str, Tensor]]:
    """The config, the base model's name and the tensors of an adapter folder.

    Raises UserError when it is missing, damaged (in a run folder, which has the checksums), or of a
    kind that is not built here.
    """
    check_recorded(folder)
    try:
        content = json.loads((folder / CONFIG).read_text())
        state = load_file(folder / WEIGHTS)
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise UserError(f"the adapter {folder} cannot be read: {error}") from None
    _check_kinds(content, folder)
    refused = [
        f"{key}: {content[key]!r}"
        for key, plain in _PLAIN.items()
        if content.get(key, plain) not in (plain, None)
    ]
    if refused:
        raise UserError(f"the adapter {folder} has {refused[0]}, which is not supported")
    targets = content["target_modules"]
    if isinstance(targets, str):
        raise UserError(
            f"the adapter {folder} has target_modules: {targets!r}, a pattern, which is not "
            "supported; write the list of names that it stands for"
        )
    config = LoraConfig(
        r=content["r"],
        lora_alpha=content["lora_alpha"],
        lora_dropout=content.get("lora_dropout", 0.0),
        use_rslora=content.get("use_rslora", False),
        target_modules=tuple(targets),
        use_dora=content.get("use_dora", False),
        modules_to_save=_whole_modules(state),
    )
    return config, content["base_model_name_or_path"], state


def base_revision(folder: Path) -> str | None:
    """The commit, tag or branch of the base model that an adapter folder names, if it does."""
    revision = json.loads((folder / CONFIG).read_text()).get("revision")
    return str(revision) if revision else None


def _check_kinds(content: Any, folder: Path) -> None:
    """Raises UserError where a value of adapter_config.json that is used is of another kind."""
    if not isinstance(content, dict):
        raise UserError(f"{folder / CONFIG} is no object; take the adapter's own file")
    for key, (kind, needed, fits) in _KINDS.items():
        value = content.get(key)
        if value is None and not needed:
            continue
        if not isinstance(value, kind) or not fits(value):
            raise UserError(
                f"{folder / CONFIG} has {key}: {str(value)[:100]!r}, which makes no sense; take "
                "the adapter's own file"
            )


def _whole_modules(state: dict[str, Tensor]) -> tuple[str, ...]:
    """The modules that an adapter's tensors hold whole, but for a head of the task's own, by their
    names in a causal model."""
    names = [name.removeprefix("base_model.model.") for name in state]
    modules = [n.rpartition(".")[0] for n in names if ".lora_" not in n and ROWS not in n]
    causal = [name.replace("transformer.", "model.", 1) for name in modules if name not in HEADS]
    return tuple(dict.fromkeys(causal))


def check_same_adapter(wanted: LoraConfig, found: LoraConfig, folder: Path) -> None:
    """Raises UserError when the adapter in `folder` differs from the recipe's in its method, its
    shape or its scale; dropout may differ."""
    ours, theirs = _in_recipe(wanted), _in_recipe(found)
    for key, value in ours.items():
        if value != theirs[key]:
            raise UserError(
                f"adapter.init_from: the adapter {folder} has {key}: {theirs[key]}, and the "
                f"recipe has {value}; set adapter.{key}: {theirs[key]}"
            )


def _in_recipe(config: LoraConfig) -> dict[str, Any]:
    return {
        "method": "dora" if config.use_dora else "lora",
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "use_rslora": config.use_rslora,
        "target_modules": sorted(config.target_modules),
        "modules_to_save": sorted(config.modules_to_save),
    }


_Fits = Callable[[Any], bool]
_ANY: _Fits = lambda value: True  # noqa: E731
_KINDS: dict[str, tuple[type | tuple[type, ...], bool, _Fits]] = {
    "r": (int, True, lambda r: 1 <= r < 2**31 and r is not True),
    "lora_alpha": ((int, float), True, lambda alpha: 0 < alpha < math.inf and alpha is not True),
    "lora_dropout": ((int, float), False, lambda share: 0 <= share < 1),
    "use_rslora": (bool, False, _ANY),
    "use_dora": (bool, False, _ANY),
    "base_model_name_or_path": (str, True, bool),
    "target_modules": (
        (list, str),
        True,
        lambda names: bool(names) and all(isinstance(name, str) for name in names),
    ),
}
"""Of each key: its kind, whether it must be there, and what its value must be."""

HALVES = ("lora_A", "lora_B")
_PAIR = ("lora_A.weight", "lora_B.weight")

_PLAIN: dict[str, Any] = {
    "peft_type": "LORA",
    "bias": "none",
    "fan_in_fan_out": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "layers_to_transform": None,
}
