"""The counter of collectives: two processes over gloo, each operation that the engine may use."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from collectives import CountedCollectives
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard


def _start(rank: int, work: Callable[[], object], folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    try:
        with CountedCollectives() as counted:
            work()
    finally:
        dist.destroy_process_group()
    calls = [[call.kind, call.payload_bytes, call.ranks] for call in counted.calls]
    (folder / f"{rank}.json").write_text(json.dumps(calls))


@pytest.fixture
def counted(tmp_path: Path):
    """Runs a function on two processes; the calls of both, which are the same."""

    def run(work: Callable[[], object]) -> list[tuple[str, int]]:
        mp.spawn(_start, args=(work, tmp_path), nprocs=2)
        found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
        assert found[0] == found[1]
        assert all(ranks == [0, 1] for _, _, ranks in found[0])
        return [(kind, size) for kind, size, _ in found[0]]

    return run


def plain_calls() -> None:
    """Tensors of 4 and 8 numbers."""
    four, eight = torch.ones(4), torch.ones(8, dtype=torch.bfloat16)
    dist.all_reduce(four)
    dist.all_gather_into_tensor(torch.empty(8), four)
    dist.all_gather([torch.empty(4), torch.empty(4)], four)
    dist.reduce_scatter_tensor(torch.empty(4, dtype=torch.bfloat16), eight)
    dist.broadcast(four, src=0)
    dist.barrier()


def test_each_call_is_counted_by_its_whole_tensor(counted) -> None:
    assert counted(plain_calls) == [
        ("all-reduce", 16),
        ("all-gather", 32),
        ("all-gather", 32),
        ("reduce-scatter", 16),
        ("broadcast", 16),
    ]


def dtensor_calls() -> None:
    mesh = init_device_mesh("cpu", (2,))
    x = torch.ones(6, 4, requires_grad=True)
    spread = DTensor.from_local(x, mesh, [Replicate()], run_check=False)
    here = spread.to_local(grad_placements=[Partial()])
    parts = DTensor.from_local(here * 2, mesh, [Partial()], run_check=False)
    whole = parts.redistribute(placements=[Replicate()]).to_local()
    whole.sum().backward()
    DTensor.from_local(torch.ones(3, 4), mesh, [Shard(0)], run_check=False).full_tensor()


def test_what_dtensor_sends_is_seen_forward_and_backward(counted) -> None:
    """The sum of an output, that of an input's gradient, and the gathering of a whole tensor."""
    collectives = [call for call in counted(dtensor_calls) if call[0] != "broadcast"]
    assert collectives == [("all-reduce", 96), ("all-reduce", 96), ("all-gather", 96)]


def fsdp_calls() -> None:
    mesh = init_device_mesh("cpu", (2,))
    model = nn.Linear(16, 8, bias=False)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    model(torch.ones(3, 16, requires_grad=True)).sum().backward()


def test_what_fsdp2_sends_is_seen_forward_and_backward(counted) -> None:
    """Gathered for each pass; the gradient scattered."""
    size = 4 * 16 * 8
    assert counted(fsdp_calls) == [
        ("all-gather", size),
        ("all-gather", size),
        ("reduce-scatter", size),
    ]


def test_calls_are_summed_by_kind_ranks_and_size() -> None:
    from collectives import Collective

    counted = CountedCollectives()
    of = {"operation": "", "dtypes": ()}
    counted.calls = [
        Collective("all-reduce", 100, (0, 1), **of),
        Collective("all-reduce", 8, (0, 1, 2, 3), **of),
        Collective("all-gather", 50, (0, 2), **of),
    ]
    assert counted.payload_bytes() == 158
    assert counted.payload_bytes("all-reduce") == 108
    assert counted.payload_bytes("all-reduce", least=64) == 100
    assert counted.payload_bytes(ranks=2) == 150
    assert counted.payload_bytes(ranks=(0, 2)) == 50
