"""Weights held in parts by several ranks, and gathered module by module: torch's FSDP2.

Each layer's attention and MLP, the head, and the embedding where the head does not share it, are
modules of their own for `fully_shard`. Frozen matrices are sharded as their codec stores them;
trained ones in fp32, and their gradients are summed and scattered pack by pack. Adapters and norms
are small and stay whole on every rank (parallel/ranks.py sums their gradients once a step).

A layer is gathered when the model comes to it, not by FSDP2's own hooks: an MLP may be computed in
tiles, on one rank in more than on another, and it is gathered once in any case.

Zhao et al. (2023): PyTorch FSDP.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

PART = "sharded_"
"""What the names of a frozen matrix's parts begin with, as parameters of its module."""

LOSSES = ("loss", "label_losses", "likeliest")
"""Methods of a head that read its matrix, beside its `forward`."""


class Frozen(Protocol):
    """A matrix in a codec (weights/frozen.py)."""

    @property
    def parts(self) -> dict[str, Tensor]: ...

    def read_from(self, source: Callable[[], dict[str, Tensor]]) -> None: ...


def shard(model: Any, mesh: DeviceMesh, *, offload: bool) -> None:
    """Hold the weights of a causal model, or of one with another head, in parts over `mesh`, a mesh
    of one dimension. offload: the parts lie in the host's memory between uses.

    Everything else of the model stays as it is. All ranks must compute as many packs.
    """
    # What it warns of, changing an output in place, no segment of a layer does.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
    base = model.model
    layers = [(layer.self_attn, layer.mlp) for layer in base.layers]
    pinned = mesh.device_type == "cuda"  # torch cannot pin memory for a CPU
    policy = CPUOffloadPolicy(pin_memory=pinned) if offload else OffloadPolicy()
    for module in [m for pair in layers for m in pair]:
        _shard_module(module, mesh, policy, reshard_after_forward=False)
    head = getattr(model, "lm_head", None)
    tied = head is not None and head.weight is base.embed_tokens.weight
    if not tied:
        _shard_module(base.embed_tokens, mesh, policy, reshard_after_forward=True)
        if head is not None:
            _shard_module(head, mesh, policy, reshard_after_forward=False)
            for name in LOSSES:
                register_fsdp_forward_method(head, name)
    stream = ShardStream([tuple(cast(FSDPModule, m) for m in pair) for pair in layers])
    base.stream = base.tiling = stream


def reshard(model: Any) -> None:
    """Give back what was gathered of a model that is held in parts."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    model.model.stream.here = None


def _shard_module(
    module: nn.Module, mesh: DeviceMesh, policy: OffloadPolicy, *, reshard_after_forward: bool
) -> None:
    settle(module, torch.device(mesh.device_type))
    for holder, weight in list(_frozen(module)):
        names = dict(weight.parts)
        for name in names:
            part = nn.Parameter(names[name], requires_grad=False)
            holder.register_parameter(PART + name, part)
        weight.read_from(partial(_gathered, holder, list(names)))
    sharded = {p for name, p in module.named_parameters() if _is_sharded(name)}
    others = {p for p in module.parameters() if p not in sharded}
    fully_shard(
        module,
        mesh=mesh,
        reshard_after_forward=reshard_after_forward,
        offload_policy=policy,
        ignored_params=others,
    )
    divided = cast(FSDPModule, module)
    divided.set_gradient_divide_factor(1.0)  # sums are divided once, by the loop
    divided.set_force_sum_reduction_for_comms(True)
    divided.unshard()  # its buffers are not to be made in an evaluation's inference mode
    divided.reshard()


def settle(module: nn.Module, device: torch.device) -> None:
    """Give what a model holds as the pages of its files (model/load.py, in_parts) a place of its
    own on `device`: trained matrices in fp32, frozen ones as they are. What is spread already
    stays, and one matrix in two places stays one."""
    moved: dict[int, Any] = {}
    for parameter in module.parameters():
        if not isinstance(parameter, DTensor):
            parameter.data = parameter.data.to(device)
    for holder in [m for m in module.modules() if hasattr(m, "hold") and not _is_spread(m)]:
        weight: Any = holder.weight
        if id(weight) not in moved:
            moved[id(weight)] = _own(weight, device)
        cast(Any, holder).hold(moved[id(weight)])


def _is_spread(holder: nn.Module) -> bool:
    in_parts = any(name.startswith(PART) for name in holder._parameters)
    return in_parts or isinstance(holder.weight, DTensor)


def _own(weight: Any, device: torch.device) -> Any:
    """A matrix in memory of its own; one that is grown by rows of new tokens has it already."""
    if hasattr(weight, "read_from"):
        return weight.to(device)
    if not isinstance(weight, nn.Parameter):
        return weight
    own = weight.detach().to(device, torch.float32, copy=True)
    return nn.Parameter(own, requires_grad=weight.requires_grad)


def _gathered(holder: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """The parts of a frozen matrix as FSDP2 holds them now."""
    return {name: holder._parameters[PART + name].detach() for name in names}  # type: ignore[union-attr]


def _is_sharded(name: str) -> bool:
    """Of a parameter by its name: a matrix of the model, trained or in parts, and no adapter."""
    last = name.rpartition(".")[2]
    return last == "weight" or last.startswith(PART)


def _frozen(module: nn.Module) -> Iterator[tuple[nn.Module, Frozen]]:
    """The frozen matrices below a module, each with the module that holds it."""
    for holder in module.modules():
        weight = vars(holder).get("weight")
        weight = getattr(weight, "base", weight)  # one that is grown by rows of new tokens
        if hasattr(weight, "read_from"):
            yield holder, cast(Frozen, weight)


class ShardStream:
    """Gathers the layer that the model comes to, and lets go of the one before.

    It is the model's `stream` (weights/stream.py) and its `tiling` (model/replay.py) in one: only
    after the last tile of an MLP are its gradients summed over the ranks, and the MLP let go of.
    """

    def __init__(self, layers: list[tuple[FSDPModule, ...]]) -> None:
        self.layers = layers
        self.here: int | None = None
        self._goes_on = False

    def before(self, layer: int, step: int) -> None:
        """`layer` is about to be used: gather it, and give the one before back."""
        if self.here not in (None, layer):
            self._let_go(cast(int, self.here))
        if self.here != layer:
            for module in self.layers[layer]:
                module.unshard()
        self.here = layer

    def _let_go(self, layer: int) -> None:
        for module in self.layers[layer]:
            module.reshard()

    @property
    def goes_on(self) -> bool:
        return self._goes_on

    @goes_on.setter
    def goes_on(self, others_follow: bool) -> None:
        self._goes_on = others_follow
        if self.here is None:
            return
        for module in self.layers[self.here]:
            module.set_requires_gradient_sync(not others_follow)
            module.set_reshard_after_backward(not others_follow)
