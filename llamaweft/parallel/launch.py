"""`--nproc N`: start the ranks of a run on this machine, by torch's elastic agent (torchrun's).

No torch is loaded until ranks are to be started.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Sequence

from llamaweft.errors import RunError
from llamaweft.parallel.environment import Node

STOP_SECONDS = 600
"""How long ranks have to save after a stop was asked for, before they are killed."""


def launch_ranks(arguments: Sequence[str], processes: int, node: Node | None) -> int:
    """Run `llamaweft ARGUMENTS` in so many processes, and return its exit code.

    node: this machine among several, which each start theirs. Raises RunError, with the rank, where
    one was killed.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from llamaweft.parallel.watch import QUIET

    os.environ.setdefault("OMP_NUM_THREADS", str(_threads(processes)))
    os.environ.setdefault("NUMBA_NUM_THREADS", os.environ["OMP_NUM_THREADS"])
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(STOP_SECONDS))
    os.environ[QUIET] = "1"
    config = LaunchConfig(
        min_nodes=1 if node is None else node.count,
        max_nodes=1 if node is None else node.count,
        nproc_per_node=processes,
        run_id=f"llamaweft-{os.getpid()}" if node is None else "llamaweft",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0" if node is None else f"{node.address}:{node.port}",
        max_restarts=0,
        monitor_interval=0.1,
        logs_specs=DefaultLogsSpecs(log_dir=tempfile.mkdtemp(prefix="llamaweft-ranks-")),
    )
    try:
        elastic_launch(config, sys.executable)("-m", "llamaweft", *arguments)
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    except ChildFailedError as failed:
        return _ended(failed)
    return 0


def _threads(processes: int) -> int:
    """Cores for each process."""
    return max(1, len(os.sched_getaffinity(0)) // processes)


def _ended(failed: object) -> int:
    """The exit code of the rank that failed first. Raises RunError where it was killed."""
    failures = sorted(failed.failures.items(), key=lambda item: item[1].timestamp)  # type: ignore[attr-defined]
    rank, first = failures[0]
    if first.exitcode < 0:
        name = signal.Signals(-first.exitcode).name
        raise RunError(
            f"rank {rank} was killed ({name}); the run has ended on all ranks, --resume goes on "
            "from the newest checkpoint"
        )
    return int(first.exitcode)
