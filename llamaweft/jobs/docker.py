"""Docker: an image with the whole job inside, and how to run it on one machine with NVIDIA GPUs."""

from __future__ import annotations

from typing import Any

from llamaweft.errors import UserError
from llamaweft.jobs.job import Job

IMAGE = {"Dockerfile": "Dockerfile.jinja", ".dockerignore": "dockerignore.jinja"}
TEMPLATES = IMAGE | {"run.sh": "docker-run.sh.jinja"}


def check(job: Job) -> None:
    if job.needs.nodes > 1:
        raise UserError(
            f"--nodes {job.needs.nodes}: docker runs a job on one machine; use --on kubernetes, or "
            "--on slurm"
        )


def values(job: Job) -> dict[str, Any]:
    return {"command": job.command()}


def next_steps(job: Job) -> list[str]:
    return [f"docker build --tag {job.image_name} .", "bash run.sh"]
