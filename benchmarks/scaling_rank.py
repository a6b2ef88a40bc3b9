"""One rank of a contender of `bench_scaling`: on a core of its own, rank 0 a step for each `go`.

python -m benchmarks.scaling_rank '{"engine": {...}, "layout": {"data": 2}, "core": 0, ...}', with
torch's env:// names set where the layout is of several.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.engine import Settings, Turnstile
from benchmarks.step_server import StepServer
from llamaweft.parallel.layout import Layout
from llamaweft.parallel.ranks import ALONE, Ranks
from llamaweft.pipeline import Pipeline
from llamaweft.train.events import StopRequest

TIMEOUT = timedelta(minutes=30)
"""Ranks wait for each other while other contenders have their turns."""


@contextmanager
def ranks_of(layout: Layout) -> Iterator[Ranks]:
    """This process among those of its contender."""
    if layout.world == 1:
        yield ALONE
        return
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", timeout=TIMEOUT)
    try:
        yield Ranks(layout, rank, local_rank=rank, on_machine=layout.world)
    finally:
        dist.destroy_process_group()


def main(given: dict[str, Any]) -> None:
    os.sched_setaffinity(0, {given["core"]})
    torch.set_num_threads(1)
    server, stop = StepServer(), StopRequest()
    recipe = Settings(**given["engine"]).recipe(given["output_dir"])
    training = recipe.training.model_copy(update={"max_steps": given["steps"]})
    recipe = recipe.model_copy(update={"training": training})
    with ranks_of(Layout(**given["layout"])) as ranks:
        listeners = [Turnstile(server, stop)] if ranks.first else []
        Pipeline(recipe, ranks).train(listeners=listeners, stop=stop)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
