"""Run as each rank of a process group: trains every case of a file on its layout, one after the
other, and leaves the run folders. `python rank_cases.py CASES.json`, with torch's env:// names set.
"""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from pathlib import Path


def main(cases: list[dict]) -> None:
    import torch
    import torch.distributed as dist

    from llamaweft.parallel.layout import Layout
    from llamaweft.parallel.ranks import Ranks
    from llamaweft.pipeline import Pipeline
    from llamaweft.recipe import Recipe

    torch.set_num_threads(1)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    for case in cases:
        recipe = Recipe.validate_tree(case["recipe"])
        ranks = Ranks(Layout(**case["layout"]), rank, local_rank=rank, on_machine=world)
        Pipeline(recipe, ranks).train(resume=case.get("resume", False))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
