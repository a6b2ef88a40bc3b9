"""Load a model: built without memory, then filled tensor by tensor.

Trained weights are read and cast one at a time; frozen ones are mapped from the model's store
(model/stores.py), which is made first where there is none.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from torch import nn

from llamaweft.model.folder import checked_tensors, read_config, tensor_files
from llamaweft.model.llama import LlamaForCausalLM, empty_causal_lm
from llamaweft.model.stores import open_store
from llamaweft.weights.frozen import FrozenWeight
from llamaweft.weights.linear import Embedding, Linear
from llamaweft.weights.store import DamagedStoreError
from llamaweft.weights.stream import DeviceStream, MappedStream, Resident


def load_causal_lm(
    folder: Path,
    *,
    base_weights: str | None,
    compute_dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    resident: bool = True,
) -> LlamaForCausalLM:
    """A causal model from its folder.

    base_weights: the codec that every matrix is held in, frozen; None: everything is trained, in
    fp32. Norms are always fp32. resident: frozen layers stay on a GPU; otherwise they are copied
    to it one by one as they are needed. Raises UserError for a missing, truncated or left-over
    shard or tensor, a wrong shape and a wrong dtype, DamagedStoreError for a store that is not
    what was written.
    """
    if base_weights is None:
        model = _trained_causal_lm(folder, device)
    else:
        model = _frozen_causal_lm(folder, base_weights, torch.device(device), resident)
    model.model.compute_dtype = compute_dtype
    return model


def _trained_causal_lm(folder: Path, device: torch.device | str) -> LlamaForCausalLM:
    config = read_config(folder)
    model = empty_causal_lm(config)
    for tensor in checked_tensors(folder, model, config):
        # A copy, since a tensor read from a file may be the file's own pages.
        value = tensor.read().to(device=device, dtype=torch.float32, copy=True)
        parent, _, attribute = tensor.name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, nn.Parameter(value))
    model.tie_weights()
    return model


def _frozen_causal_lm(
    folder: Path, codec: str, device: torch.device, resident: bool
) -> LlamaForCausalLM:
    store = open_store(folder, codec)
    model = empty_causal_lm(read_config(folder))
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    for name, shape in shapes.items():
        if name not in store.names or store.shape(name) != shape:
            raise DamagedStoreError(
                f"{store.folder} is the store of another model: it has no {name} of shape "
                f"{tuple(shape)}; delete the folder and make it again"
            )
        module = model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, Linear | Embedding):
            matrix = store.matrix(name)
            stays_on_host = not resident and ".layers." in name
            module.hold(matrix if stays_on_host else matrix.to(device))
        else:
            vector = store.vector(name).to(device)
            module.weight = nn.Parameter(vector, requires_grad=False)
    model.tie_weights()
    layers = [
        [m.weight for m in layer.modules() if isinstance(m, Linear)] for layer in model.model.layers
    ]
    if device.type == "cpu":
        prefix = "model.layers.{}."
        names = [
            [name for name in shapes if name.startswith(prefix.format(index))]
            for index in range(len(layers))
        ]
        model.model.stream = MappedStream(store, names)
    else:
        model.model.stream = (
            Resident() if resident else DeviceStream(cast(list[list[FrozenWeight]], layers), device)
        )
    return model


def copy_weights(folder: Path, model: nn.Module) -> None:
    """Fill a model's trained weights from a Hugging Face folder."""
    with torch.no_grad():
        for tensor in tensor_files(folder):
            model.get_parameter(tensor.name).copy_(tensor.read())
