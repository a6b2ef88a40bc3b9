"""Counts what a process gives to torch.distributed: the kind, size and ranks of each collective.

    with CountedCollectives() as counted:
        step()
    counted.payload_bytes("all-reduce", ranks=2)

Seen are the operations below torch's own functions, wherever they are called from: DDP, FSDP2,
DTensor, autograd. Payload is counted as in plan/communication.py: the tensor of an all-reduce, the
whole result of an all-gather, the whole input of a reduce-scatter. What an operation is called with
is all that is read, so nothing is waited for and no number changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True)
class Collective:
    """One call. ranks: numbers, in the whole run, of the processes that it is among."""

    kind: str
    payload_bytes: int
    ranks: tuple[int, ...]
    operation: str
    dtypes: tuple[torch.dtype, ...]


def _bytes_of(tensors: Any) -> tuple[int, set[torch.dtype]]:
    """Of tensors in lists of any depth."""
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size(), {tensors.dtype}
    found = [_bytes_of(one) for one in tensors]
    return sum(size for size, _ in found), set().union(*(kinds for _, kinds in found))


def _argument(place: int, times_ranks: bool = False) -> Callable[[tuple[Any, ...], int], Any]:
    """The bytes and dtypes of an argument; times the ranks where it is one rank's part."""

    def of(arguments: tuple[Any, ...], ranks: int) -> tuple[int, set[torch.dtype]]:
        size, kinds = _bytes_of(arguments[place])
        return size * (ranks if times_ranks else 1), kinds

    return of


FIRST, SECOND = _argument(0), _argument(1)
FIRST_OF_ALL, SECOND_OF_ALL = _argument(0, times_ranks=True), _argument(1, times_ranks=True)

OPERATIONS = {
    "c10d::allreduce_": ("all-reduce", FIRST),
    "c10d::allreduce_coalesced_": ("all-reduce", FIRST),
    "c10d::allgather_": ("all-gather", FIRST),
    "c10d::allgather_coalesced_": ("all-gather", FIRST),
    "c10d::_allgather_base_": ("all-gather", FIRST),
    "c10d::allgather_into_tensor_coalesced_": ("all-gather", FIRST),
    "c10d::reduce_scatter_": ("reduce-scatter", SECOND),
    "c10d::_reduce_scatter_base_": ("reduce-scatter", SECOND),
    "c10d::reduce_scatter_tensor_coalesced_": ("reduce-scatter", SECOND),
    "c10d::broadcast_": ("broadcast", FIRST),
    "c10d::reduce_": ("reduce", FIRST),
    "c10d::gather_": ("gather", SECOND_OF_ALL),
    "c10d::scatter_": ("scatter", FIRST_OF_ALL),
    "c10d::alltoall_": ("all-to-all", SECOND),
    "c10d::alltoall_base_": ("all-to-all", SECOND),
    "_c10d_functional::all_reduce": ("all-reduce", FIRST),
    "_c10d_functional::all_reduce_": ("all-reduce", FIRST),
    "_c10d_functional::all_reduce_coalesced": ("all-reduce", FIRST),
    "_c10d_functional::all_reduce_coalesced_": ("all-reduce", FIRST),
    "_c10d_functional::all_gather_into_tensor": ("all-gather", FIRST_OF_ALL),
    "_c10d_functional::all_gather_into_tensor_out": ("all-gather", FIRST_OF_ALL),
    "_c10d_functional::all_gather_into_tensor_coalesced": ("all-gather", FIRST_OF_ALL),
    "_c10d_functional::reduce_scatter_tensor": ("reduce-scatter", FIRST),
    "_c10d_functional::reduce_scatter_tensor_out": ("reduce-scatter", FIRST),
    "_c10d_functional::reduce_scatter_tensor_coalesced": ("reduce-scatter", FIRST),
    "_c10d_functional::broadcast": ("broadcast", FIRST),
    "_c10d_functional::broadcast_": ("broadcast", FIRST),
    "_c10d_functional::all_to_all_single": ("all-to-all", FIRST),
}
"""Operation -> kind, and which argument is its payload."""

WITHOUT_PAYLOAD = {
    "c10d::barrier",
    "c10d::monitored_barrier_",
    "c10d::check_for_nan",
    "_c10d_functional::wait_tensor",
    "_c10d_functional::_wrap_tensor_autograd",
}
"""Operations that send no tensor of the caller's."""


class CountedCollectives(TorchDispatchMode):
    """Counts while it is entered, in the calling thread and in the backward pass of a CPU.

    Raises AssertionError for an operation that it does not know, so that none is missed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Collective] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if any(issubclass(kind, dist.tensor.DTensor) for kind in types):
            return NotImplemented  # what it does for that is seen
        name = func.name().partition(".")[0]
        if name.startswith(("c10d::", "_c10d_functional::")) and name not in WITHOUT_PAYLOAD:
            assert name in OPERATIONS, f"{name} is not counted"
            kind, payload = OPERATIONS[name]
            ranks = _ranks(func, args, kwargs or {})
            size, dtypes = payload(args, len(ranks))
            self.calls.append(Collective(kind, size, ranks, name, tuple(sorted(dtypes, key=str))))
        return func(*args, **(kwargs or {}))

    def payload_bytes(
        self, kind: str | None = None, ranks: int | Iterable[int] | None = None, least: int = 0
    ) -> int:
        """Of all calls of a kind, among so many ranks or among these, left out those of fewer than
        `least` bytes: losses, norms, clocks."""
        wanted = tuple(ranks) if isinstance(ranks, Iterable) else None
        return sum(
            call.payload_bytes
            for call in self.calls
            if kind in (None, call.kind)
            and (ranks is None or call.ranks == wanted or len(call.ranks) == ranks)
            and call.payload_bytes >= least
        )


def _ranks(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...]:
    """The group is an argument: an object, or a name."""
    for argument, declared in zip(args, func._schema.arguments, strict=False):
        if declared.name == "group_name":
            return _of_name(argument)
        if declared.name == "process_group":
            return tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(argument)))
    return _of_name(kwargs["group_name"])


def _of_name(name: Any) -> tuple[int, ...]:
    group = dist.distributed_c10d._resolve_process_group(name) if isinstance(name, str) else name
    return tuple(dist.get_process_group_ranks(group))
