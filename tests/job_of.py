"""Jobs made by hand."""

from __future__ import annotations

from typing import Any

from llamaweft.jobs.carry import Carried
from llamaweft.jobs.job import Job
from llamaweft.jobs.needs import Needs
from llamaweft.recipe import Recipe

GIB = 2**30


def needs_for(device: str = "h100", **changes: Any) -> Needs:
    values = {
        "device": device, "devices": 1, "nodes": 1, "peak_bytes": 20 * GIB, "usable_bytes": 70 * GIB,
        "host_bytes": 12 * GIB + 1, "disk_bytes": 80 * GIB, "seconds": 7200.0, "limit_seconds": 12_660,
        "price": None, "layout": "one process",
    }  # fmt: skip
    return Needs(**(values | changes))


def job_of(
    *needs: Needs, output_dir: str = "runs/my run_1", image: str | None = None, **changes: Any
) -> Job:
    recipe = Recipe.validate_tree(
        {"model": "owner/name", "data": {"train": {"hub": "owner/rows"}}, "output_dir": output_dir}
    )
    return Job(
        recipe,
        list(needs) or [needs_for()],
        Carried(text=recipe.dump(), requirements=["torch==2.9.0"]),
        image=image,
        **changes,
    )
