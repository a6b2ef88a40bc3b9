"""Joining the processes of a run, on one machine or on several, and leaving them again.

Processes are started by `--nproc` (launch.py), torchrun, `accelerate launch` or a cluster's own
launcher; environment.py finds out which. Accelerate's PartialState makes the process group: gloo on
CPUs, NCCL on GPUs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch.distributed import PrefixStore, TCPStore

from llamaweft.errors import RunError, UserError
from llamaweft.parallel.environment import World, to_env
from llamaweft.parallel.layout import Layout, check_world
from llamaweft.parallel.ranks import Ranks
from llamaweft.parallel.watch import QUIET, Watch, ended_by

JOIN_SECONDS = 300.0
"""How long ranks wait for each other at the start, at most."""


@contextmanager
def joined(
    world: World, layout: Callable[[], tuple[Layout, str]], device: str, timeout_seconds: float
) -> Iterator[Ranks]:
    """This process among those of the run, until the block is left.

    layout: called on rank 0, once all are there, for the mesh and the reason for it; the others
    hear of it. device: cpu or cuda.
    timeout_seconds: how long a rank waits for another. Raises UserError where not all processes
    come, or the layout is of another number of them; RunError where one is lost on the way, with
    its rank.
    """
    os.environ.update(to_env(world))
    _meet(world, device, min(timeout_seconds, JOIN_SECONDS))
    watch = Watch(world.rank, world.world, world.address, world.port, str(world.restarts))
    watch.start()
    try:
        ranks = _ranks(world, layout, device, timeout_seconds)
        ranks.watch = watch
        yield ranks
        watch.stop()
        ranks.barrier()  # the store is rank 0's: it must not leave before the others
    except UserError as error:
        if not watch.speaks(str(error)):
            raise SystemExit(2) from None  # another rank says the same
        raise
    except (dist.DistError, RuntimeError) as error:
        if not _is_of_others(error):
            raise
        what = watch.lost() or f"the connection to another rank broke ({_first_line(error)})"
        if os.environ.get(QUIET) or not watch.speaks(what):
            raise SystemExit(1) from None
        raise RunError(ended_by(what)) from error
    finally:
        watch.stop()
        if dist.is_initialized():
            dist.destroy_process_group()
        PartialState._reset_state()


def _meet(world: World, device: str, seconds: float) -> None:
    if device == "cuda":
        torch.cuda.set_device(world.local_rank)
    try:
        # Names of its own for each start: torchrun's store outlives the ranks that it starts anew.
        store = PrefixStore(f"start-{world.restarts}", _store(world, seconds))
        PartialState(
            cpu=device == "cpu",
            store=store,
            rank=world.rank,
            world_size=world.world,
            timeout=timedelta(seconds=seconds),
        )
    except (dist.DistError, RuntimeError) as error:
        raise UserError(
            f"rank {world.rank} waited {seconds:.0f} s at {world.address}:{world.port} and not all "
            f"{world.world} processes came; start the others, or check that they can reach that "
            f"address ({_first_line(error)})"
        ) from None


def _store(world: World, seconds: float) -> TCPStore:
    """Where the ranks meet: rank 0 serves it, or the agent that started the ranks."""
    served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return TCPStore(
        world.address,
        world.port,
        world.world,
        is_master=world.rank == 0 and not served,
        timeout=timedelta(seconds=seconds),
        multi_tenant=True,
    )


def _ranks(
    world: World, layout: Callable[[], tuple[Layout, str]], device: str, timeout_seconds: float
) -> Ranks:
    found: list[tuple[Layout, str] | UserError | None] = [None]
    if world.rank == 0:
        try:
            chosen = layout()
            check_world(chosen[0], world.world)
            found[0] = chosen
        except UserError as error:  # for all ranks to end with
            found[0] = error
    dist.broadcast_object_list(found, src=0)
    if isinstance(found[0], UserError):
        raise found[0]
    assert found[0] is not None
    return Ranks(
        found[0][0],
        world.rank,
        device,
        local_rank=world.local_rank,
        on_machine=world.local_world,
        timeout=timedelta(seconds=timeout_seconds),
        reason=found[0][1],
    )


def _is_of_others(error: Exception) -> bool:
    """Whether it says that another process is gone or does not answer."""
    text = str(error).lower()
    signs = ("connection closed", "connection reset", "timed out", "timeout", "broken pipe")
    return isinstance(error, dist.DistError) or any(sign in text for sign in signs)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
