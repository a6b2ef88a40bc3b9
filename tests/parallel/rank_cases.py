"""Run as each rank of a process group: trains every case of a file on its layout, one after the
other, and leaves the run folders. `python rank_cases.py CASES.json`, with torch's env:// names set.
"""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path


def stop_at(step: int | None, stop: object, event: object) -> None:
    """Have one rank asked to stop, as a signal would."""
    if type(event).__name__ == "StepEnded" and event.step == step:
        stop("SIGTERM")


def main(cases: list[dict]) -> None:
    import torch
    import torch.distributed as dist

    from llamaweft.parallel.layout import Layout
    from llamaweft.parallel.ranks import Ranks
    from llamaweft.pipeline import Pipeline
    from llamaweft.recipe import Recipe
    from llamaweft.train.events import StopRequest

    torch.set_num_threads(1)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    kinds = {case["recipe"]["training"]["device"].partition(":")[0] for case in cases}
    (kind,) = kinds  # of one process group
    if kind == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=timedelta(seconds=120))
    for case in cases:
        recipe = Recipe.validate_tree(case["recipe"])
        ranks = Ranks(Layout(**case["layout"]), rank, kind, local_rank=rank, on_machine=world)
        stop = StopRequest()
        Pipeline(recipe, ranks).train(
            resume=case.get("resume", False),
            listeners=[partial(stop_at, case.get("stop_after"), stop)],
            stop=stop,
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
