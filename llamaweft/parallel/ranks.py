"""The processes of a run, and what they tell each other.

Everything that a run needs of other processes goes through `Ranks`; one process alone is a mesh of
one, where nothing is sent. Processes, devices and the collectives are torch.distributed's; who
this process is, Accelerate's PartialState finds out.

P: pack ranks, data x shard
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from llamaweft.parallel.layout import DIMENSIONS, Layout
from llamaweft.parallel.watch import Watch
from llamaweft.runtime import Share

BUCKET_BYTES = 2**28
"""Gradients are summed in flat pieces of at most so many bytes: all of an adapter's in one."""

Value = TypeVar("Value")


@dataclass(frozen=True)
class Cuts:
    """How what is trained is divided over the tensor ranks.

    dims: of a parameter that each rank holds a part of, the dimension that is cut. partial: names
    of parameters that all ranks hold whole, and whose gradients are parts of a sum.
    """

    dims: dict[str, int] = field(default_factory=dict)
    partial: frozenset[str] = frozenset()


class Ranks:
    """This process among those of a run.

    layout: the mesh, with the reason for it. rank: its number. local_rank: on its machine, None of
    one process alone; on_machine: how many there are. watch: tells the others that this one lives.
    mesh: torch's, None of one process alone and of ranks that are only planned for. cuts: set once
    a model is cut over the tensor ranks (parallel/tensor.py).
    """

    def __init__(
        self,
        layout: Layout,
        rank: int = 0,
        device: str = "cpu",
        local_rank: int | None = None,
        on_machine: int = 1,
        timeout: timedelta | None = None,
        reason: str = "",
        planned: bool = False,
    ) -> None:
        self.layout, self.rank, self.reason = layout, rank, reason
        self.local_rank, self.on_machine = local_rank, on_machine
        self.place = layout.place(rank)
        self.cuts = Cuts()
        self.watch: Watch | None = None
        self.mesh: DeviceMesh | None = None
        self._packs: Any = None
        if layout.world > 1 and not planned:
            sizes = tuple(getattr(layout, name) for name in DIMENSIONS)
            self.mesh = init_device_mesh(device, sizes, mesh_dim_names=DIMENSIONS)
            self._packs = self.mesh["data", "shard"]._flatten("packs").get_group()
            if timeout is not None:
                for group in [dist.group.WORLD, self._packs, *self.mesh.get_all_groups()]:
                    dist.distributed_c10d._set_pg_timeout(timeout, group)

    @property
    def alone(self) -> bool:
        return self.layout.world == 1

    @property
    def first(self) -> bool:
        """Whether this rank writes the run folder and speaks for all."""
        return self.rank == 0

    @property
    def pack_index(self) -> int:
        """Of the packs of a step, this rank's are those whose number is this modulo P."""
        return self.place.data * self.layout.shard + self.place.shard

    @property
    def in_step(self) -> bool:
        """Whether ranks wait for each other within a pack, so that each must compute as many."""
        return self.layout.shard > 1 or self.layout.tensor > 1

    def group(self, name: str) -> dist.ProcessGroup | None:
        """The ranks that differ in one dimension of the mesh only; None where that is of one."""
        if self.mesh is None or getattr(self.layout, name) == 1:
            return None
        return self.mesh[name].get_group()

    @cached_property
    def _device(self) -> torch.device:
        assert self.mesh is not None
        kind = self.mesh.device_type
        return (
            torch.device(kind, torch.cuda.current_device())
            if kind == "cuda"
            else torch.device(kind)
        )

    def at(self, place: str) -> None:
        """Tell the others what this rank is about to do."""
        if self.watch is not None:
            self.watch.doing = place

    # --- words and numbers ----------------------------------------------------------------------

    def gather(self, value: Value) -> list[Value]:
        """What every rank has, in the order of ranks."""
        if self.mesh is None:
            return [value]
        found: list[Any] = [None] * self.layout.world
        dist.all_gather_object(found, value)
        return found

    def of_replicas(self, value: Value) -> list[Value]:
        """What the ranks have that differ from this one in `data` only."""
        group = self.group("data")
        if group is None:
            return [value]
        found: list[Any] = [None] * self.layout.data
        dist.all_gather_object(found, value, group=group)
        return found

    def from_first(self, value: Value) -> Value:
        """What rank 0 has."""
        if self.mesh is None:
            return value
        held = [value]
        dist.broadcast_object_list(held, src=0)
        return held[0]

    def on_first(self, do: Callable[[], Value]) -> Value:
        """What `do` gives on rank 0, which alone calls it; the others wait for it."""
        return self.from_first(do() if self.first else None)  # type: ignore[return-value]

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.mesh is not None:
            self.gather(None)

    def total(self, numbers: Sequence[float]) -> list[float]:
        """The sums over the pack ranks, in fp64."""
        if self.mesh is None:
            return list(numbers)
        sums = torch.tensor(numbers, dtype=torch.float64, device=self._device)
        dist.all_reduce(sums, group=self._packs)
        return sums.tolist()

    def table(self, numbers: Sequence[float]) -> list[list[float]]:
        """The numbers of every rank, in the order of ranks, in fp64."""
        if self.mesh is None:
            return [list(numbers)]
        mine = torch.tensor(numbers, dtype=torch.float64, device=self._device)
        all_of_them = mine.new_empty(self.layout.world, len(mine))
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gather(all_of_them, mine[None])
        return all_of_them.tolist()

    @property
    def replicas(self) -> Share:
        """How rows that are measured on are shared out: over `data`; shard and tensor ranks
        measure together."""
        return Share(self.place.data, self.layout.data, self.of_replicas)

    # --- gradients ------------------------------------------------------------------------------

    def sum_gradients(self, parameters: dict[str, nn.Parameter]) -> None:
        """Make each gradient that of the whole global batch: the sum over all pack ranks, and over
        the tensor ranks where their parts are summed. A parameter without a gradient gets zeros."""
        if self.mesh is None:
            return
        for parameter in parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        of_groups: dict[str, list[Tensor]] = {"data": [], "packs": [], "all": []}
        for name, parameter in parameters.items():
            assert parameter.grad is not None
            of_groups[self._summed_over(name, parameter)].append(_local(parameter.grad))
        groups = {"data": self.group("data"), "packs": self._packs, "all": dist.group.WORLD}
        for name, gradients in of_groups.items():
            group = groups[name]
            if group is not None and dist.get_world_size(group) > 1:
                for bucket in _buckets(gradients):
                    _sum_flat(bucket, group, self._device)

    def _summed_over(self, name: str, parameter: nn.Parameter) -> str:
        """FSDP2 has summed the gradients of what it shards over its own ranks already."""
        if self._is_sharded(parameter):
            return "data"
        return "all" if name in self.cuts.partial else "packs"

    def _is_sharded(self, parameter: Tensor) -> bool:
        return self.layout.shard > 1 and "shard" in mesh_names(parameter)

    def _is_cut(self, name: str, parameter: Tensor) -> bool:
        return name in self.cuts.dims or "tensor" in mesh_names(parameter)

    def clip(self, parameters: dict[str, nn.Parameter], limit: float | None) -> float:
        """The norm of the gradient of all parameters, which is scaled to `limit` where it is
        larger, as torch's clip_grad_norm_ does."""
        sums: dict[tuple[bool, bool], Tensor] = {}
        for name, parameter in parameters.items():
            if parameter.grad is None:
                continue
            kind = self._is_sharded(parameter), self._is_cut(name, parameter)
            size = torch.linalg.vector_norm(_local(parameter.grad), dtype=torch.float64)
            square = size.square().to(self._device)  # an offloaded one lies in the host's memory
            sums[kind] = sums.get(kind, torch.zeros_like(square)) + square
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for sharded in (False, True):  # in the same order on all ranks
            for cut in (False, True):
                part = sums.get((sharded, cut), torch.zeros_like(total))
                for name, divided in (("shard", sharded), ("tensor", cut)):
                    if divided and (group := self.group(name)) is not None:
                        dist.all_reduce(part, group=group)
                total = total + part
        norm = total.sqrt().item()
        if limit is not None:
            factor = min(1.0, limit / (norm + 1e-6))
            for parameter in parameters.values():
                if parameter.grad is not None:
                    _local(parameter.grad).mul_(factor)
        return norm

    # --- whole tensors --------------------------------------------------------------------------

    def whole(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of the model as one process alone would hold it. All ranks must ask."""
        if isinstance(tensor, DTensor):
            return tensor.full_tensor()
        dim, group = self.cuts.dims.get(name), self.group("tensor")
        if dim is None or group is None or not tensor.ndim:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.layout.tensor)]
        dist.all_gather(parts, tensor.detach().contiguous(), group=group)
        return torch.cat(parts, dim)

    def outlines(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The shapes and dtypes that `whole` would give, without numbers."""
        found = {}
        for name, tensor in tensors.items():
            shape = list(tensor.shape)
            if (dim := self.cuts.dims.get(name)) is not None:
                shape[dim] *= self.layout.tensor
            found[name] = torch.empty(shape, dtype=tensor.dtype, device="meta")
        return found

    def part(self, name: str, whole: Tensor) -> Tensor:
        """What a rank that holds a cut of a parameter has of all of it."""
        dim = self.cuts.dims.get(name)
        return whole if dim is None else whole.chunk(self.layout.tensor, dim)[self.place.tensor]

    @torch.no_grad()
    def fill(self, name: str, tensor: Tensor, whole: Tensor) -> None:
        """Put this rank's part of a whole tensor into a tensor of the model."""
        if not isinstance(tensor, DTensor):
            tensor.copy_(self.part(name, whole))
            return
        names, mine = mesh_names(tensor), whole
        for dimension in ("tensor", "shard"):  # FSDP2 divides what was cut before
            if dimension in names:
                dim = tensor.placements[names.index(dimension)].dim  # type: ignore[attr-defined]
                place = getattr(self.place, dimension)
                chunks = mine.chunk(getattr(self.layout, dimension), dim)
                mine = chunks[place] if place < len(chunks) else mine.narrow(dim, 0, 0)
        tensor.to_local().copy_(mine)


ALONE = Ranks(Layout())
"""One process that is all there is."""


def mesh_names(tensor: Tensor) -> tuple[str, ...]:
    """The dimensions of the mesh that a tensor is divided over; none of a plain one."""
    if not isinstance(tensor, DTensor):
        return ()
    return tensor.device_mesh.mesh_dim_names or ()


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _buckets(gradients: list[Tensor]) -> list[list[Tensor]]:
    """Neighbours, up to BUCKET_BYTES together."""
    buckets: list[list[Tensor]] = []
    room = 0
    for gradient in gradients:
        if gradient.nbytes > room:
            buckets.append([])
            room = BUCKET_BYTES
        buckets[-1].append(gradient)
        room -= gradient.nbytes
    return buckets


def _sum_flat(gradients: list[Tensor], group: dist.ProcessGroup, device: torch.device) -> None:
    flat = torch.cat([gradient.flatten() for gradient in gradients]).to(device)
    dist.all_reduce(flat, group=group)
    sizes = [gradient.numel() for gradient in gradients]
    for gradient, summed in zip(gradients, flat.split(sizes), strict=True):
        gradient.copy_(summed.view_as(gradient))
