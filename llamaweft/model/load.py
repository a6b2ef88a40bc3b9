"""Load a model: built without memory, then filled tensor by tensor.

Trained weights are read and cast one at a time; frozen ones are mapped from the model's store
(model/stores.py), which is made first where there is none.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from llamaweft.errors import UserError
from llamaweft.files import check_recorded
from llamaweft.model.folder import TensorFile, checked_tensors, read_config, tensor_files
from llamaweft.model.llama import LlamaForCausalLM, empty_causal_lm
from llamaweft.model.stores import open_store, own_codec
from llamaweft.weights.frozen import FrozenWeight
from llamaweft.weights.linear import Embedding, Linear
from llamaweft.weights.store import DamagedStoreError, Store
from llamaweft.weights.stream import DeviceStream, MappedStream, Resident


def load_causal_lm(
    folder: Path,
    *,
    base_weights: str | None,
    compute_dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    resident: bool = True,
    trained: Collection[str] = (),
    in_parts: bool = False,
) -> LlamaForCausalLM:
    """A causal model from its folder.

    base_weights: the codec that every matrix is held in, frozen; None: everything is trained, in
    fp32. Norms are always fp32. resident: frozen layers stay on a GPU; otherwise they are copied
    to it one by one as they are needed, and none of them may be trained. trained: modules whose
    weights are trained in fp32 all the same; they start from the folder's own numbers, or from what
    the codec made of them where the folder has nothing else. in_parts: the model is spread over
    ranks next (parallel/spread.py), and until then its matrices are the pages and the dtype of
    their files, so that no rank ever holds all of them.

    Raises UserError for a missing, truncated or left-over shard or tensor, a wrong shape and a
    wrong dtype, DamagedStoreError for a store that is not what was written.
    """
    if base_weights is None:
        model = _trained_causal_lm(folder, device, in_parts)
    else:
        model = _frozen_causal_lm(
            folder, base_weights, torch.device(device), resident, frozenset(trained), in_parts
        )
    model.model.compute_dtype = compute_dtype
    return model


def _trained_causal_lm(
    folder: Path, device: torch.device | str, in_parts: bool
) -> LlamaForCausalLM:
    check_recorded(folder)  # where it is what a run trained
    config = read_config(folder)
    model = empty_causal_lm(config)
    for tensor in checked_tensors(folder, model, config):
        if in_parts and len(tensor.shape) > 1:
            value = tensor.mapped()
        else:
            # A copy, since a tensor read from a file may be the file's own pages.
            value = tensor.read().to(device=device, dtype=torch.float32, copy=True)
        parent, _, attribute = tensor.name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, nn.Parameter(value))
    model.tie_weights()
    return model


def _frozen_causal_lm(
    folder: Path,
    codec: str,
    device: torch.device,
    resident: bool,
    trained: frozenset[str],
    in_parts: bool,
) -> LlamaForCausalLM:
    store = open_store(folder, codec)
    model = empty_causal_lm(read_config(folder))
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    whole = {name for name in shapes if name.rpartition(".")[0] in trained}
    own = _own_numbers(folder, whole)
    for name, shape in shapes.items():
        if name not in store.names or store.shape(name) != shape:
            raise DamagedStoreError(
                f"{store.folder} is the store of another model: it has no {name} of shape "
                f"{tuple(shape)}; delete the folder and make it again"
            )
        module = model.get_submodule(name.rpartition(".")[0])
        if name in whole:
            held = own[name].read() if name in own else _decoded(store, name)
            # A copy, since what is read may be the file's own pages.
            module.weight = nn.Parameter(held.to(device, torch.float32, copy=True))
        elif isinstance(module, Linear | Embedding):
            matrix = store.matrix(name)
            stays_on_host = in_parts or (not resident and ".layers." in name)
            module.hold(matrix if stays_on_host else matrix.to(device))
        else:
            vector = store.vector(name).to(device)
            module.weight = nn.Parameter(vector, requires_grad=False)
    model.tie_weights()
    layers = [
        [m.weight for m in layer.modules() if isinstance(m, Linear)] for layer in model.model.layers
    ]
    assert resident or all(isinstance(w, FrozenWeight) for layer in layers for w in layer)
    if device.type == "cpu":
        prefix = "model.layers.{}."
        names = [
            [name for name in shapes if name.startswith(prefix.format(index)) and name not in whole]
            for index in range(len(layers))
        ]
        model.model.stream = MappedStream(store, names)
    else:
        model.model.stream = (
            Resident() if resident else DeviceStream(cast(list[list[FrozenWeight]], layers), device)
        )
    return model


def _own_numbers(folder: Path, names: set[str]) -> dict[str, TensorFile]:
    """The tensors of these names in a folder of safetensors; none in one that has a store only."""
    if not names or own_codec(folder) is not None:
        return {}
    return {tensor.name: tensor for tensor in tensor_files(folder) if tensor.name in names}


def _decoded(store: Store, name: str) -> Tensor:
    """A tensor of a store in fp32."""
    if len(store.shape(name)) > 1:
        return store.matrix(name).dequantised()
    return store.vector(name)


def same_weights(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Another model on the same frozen weights: what is put into the one, or set, the other does
    not have. Trained parameters are copied."""
    shared: list[object] = [model.model.stream]
    for module in model.modules():
        shared += [p for p in module.parameters(recurse=False) if not p.requires_grad]
        held = [getattr(value, "base", value) for value in vars(module).values()]
        shared += [weight for weight in held if isinstance(weight, FrozenWeight)]
    return copy.deepcopy(model, {id(part): part for part in shared})


def copy_weights(
    folder: Path,
    model: nn.Module,
    fill: Callable[[str, Tensor, Tensor], object] = lambda name, held, read: held.copy_(read),
) -> None:
    """Fill a model's trained weights from a Hugging Face folder, which has others too. fill: puts
    what was read into what is held of it.

    Raises UserError where it lacks one.
    """
    missing = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for tensor in tensor_files(folder):
            if tensor.name in missing:
                fill(tensor.name, missing.pop(tensor.name), tensor.read())
    if missing:
        raise UserError(
            f"{folder} lacks {min(missing)}, which this run trains; give the run's own folder"
        )
