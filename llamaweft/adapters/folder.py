"""The adapter folder: adapter_config.json and adapter_model.safetensors, exactly as PEFT's."""

from __future__ import annotations

import json
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
from llamaweft.weights.grown import ROWS

HEADS = ("score", "qa_outputs")
"""Modules that an adapter folder may hold whole, by their names in transformers."""

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The trained tensors under PEFT's names; of PiSSA copies, with where it started."""
    state = {}
    for name, layer in lora_layers(model).items():
        pair = layer.lora_A.detach(), layer.lora_B.detach()
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


def save_adapter(model: nn.Module, config: LoraConfig, base: str, folder: Path) -> None:
    """Write the adapter folder. `base`: absolute path or hub id of the base model, which PEFT
    opens under `base_model_name_or_path`."""
    config = config.saved
    folder.mkdir(parents=True, exist_ok=True)
    state, seen = {}, set[int]()
    for name, tensor in adapter_state(model).items():
        shared = tensor.data_ptr() in seen  # of a tied matrix safetensors wants two copies
        seen.add(tensor.data_ptr())
        state[name] = tensor.clone() if shared else tensor.cpu().contiguous()
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    content: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": getattr(model, "peft_task", "CAUSAL_LM"),
        "base_model_name_or_path": base,
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

    Raises UserError when it is missing, damaged, or of a kind that is not built here.
    """
    try:
        content = json.loads((folder / CONFIG).read_text())
        state = load_file(folder / WEIGHTS)
    except (OSError, json.JSONDecodeError, SafetensorError) as error:
        raise UserError(f"the adapter {folder} cannot be read: {error}") from None
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


_PAIR = ("lora_A.weight", "lora_B.weight")

_PLAIN: dict[str, Any] = {
    "peft_type": "LORA",
    "bias": "none",
    "fan_in_fan_out": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "layers_to_transform": None,
}
