"""Slurm: a batch script (sbatch(1)) in a folder that all nodes see."""

from __future__ import annotations

from typing import Any

from llamaweft.jobs.job import Job

TEMPLATES = {"job.sh": "slurm.sh.jinja", "setup.sh": "setup.sh.jinja"}

SIGNAL_SECONDS = 300
"""So long before its time is up the run is asked to save and stop."""


def check(job: Job) -> None:
    """Nothing that a recipe can say is beyond Slurm."""


def values(job: Job) -> dict[str, Any]:
    return {
        "time": slurm_time(job.needs.limit_seconds),
        "signal_seconds": SIGNAL_SECONDS,
        "command": job.command(identity='"$SLURM_JOB_ID"'),
    }


def slurm_time(seconds: int) -> str:
    """DAYS-HOURS:MINUTES:SECONDS."""
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days}-{hours:02}:{minutes:02}:{rest:02}"


def next_steps(job: Job) -> list[str]:
    return ["bash setup.sh", "sbatch job.sh"]
