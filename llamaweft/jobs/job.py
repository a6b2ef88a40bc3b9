"""A job: a recipe, what it needs, and what all platforms share of the way to start it.

A platform is a file beside this one with a `TEMPLATES` table (file of the job -> template), a
`check` that refuses what the platform cannot do, `values` for its templates, and `next_steps`.
A template is Jinja's, with `yaml` and `shell` to write a value as either reads it.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from jinja2 import Environment, PackageLoader, StrictUndefined

from llamaweft import __version__
from llamaweft.errors import UserError
from llamaweft.files import write_text, written_aside
from llamaweft.jobs.carry import Carried, carry, write_carried
from llamaweft.jobs.needs import Needs
from llamaweft.recipe import Recipe

MAX_RESTARTS = 3
"""How often torchrun starts all ranks anew; each time they go on from the last checkpoint."""

PORT = 29400
"""Where the nodes of a job meet: torchrun's own default."""

NAME_CHARACTERS = 40


@dataclass(frozen=True)
class Job:
    """candidates: devices that it may run on, the first of them asked for; unfit: why others that
    have a price are none. image: a container image by its name, where the platform takes one."""

    recipe: Recipe
    candidates: Sequence[Needs]
    carried: Carried
    unfit: dict[str, str] = field(default_factory=dict)
    image: str | None = None

    @property
    def needs(self) -> Needs:
        return self.candidates[0]

    @property
    def name(self) -> str:
        """Of the run, as a label of RFC 1123 that begins with a letter."""
        words = re.sub(r"[^a-z0-9]+", "-", Path(self.recipe.output_dir).name.lower())
        return f"llamaweft-{words.strip('-')}"[:NAME_CHARACTERS].strip("-")

    @property
    def image_name(self) -> str:
        return self.image or f"{self.name}:latest"

    @property
    def output(self) -> str:
        """Where the run folder is, from the job's folder; absolute: on the machines it runs on."""
        return self.recipe.output_dir

    @property
    def volume(self) -> str:
        """The folder to mount for results: the first below the job's, or the parent of one that is
        absolute."""
        path = Path(self.output)
        return str(path.parent) if path.is_absolute() else path.parts[0]

    def command(self, rendezvous: str = f'"$head:{PORT}"', identity: str = "llamaweft") -> str:
        """The line that starts the run on a node, in the job's folder. It goes on from a checkpoint
        where there is one. rendezvous, identity: words of the shell, for several nodes."""
        verb = "llamaweft train recipe.yaml --resume"
        needs = self.needs
        if needs.processes == 1:
            return f"python -m {verb}"
        nodes = "--standalone"
        if needs.nodes > 1:
            nodes = (
                f"--nnodes {needs.nodes} --rdzv-backend c10d --rdzv-endpoint {rendezvous} "
                f"--rdzv-id {identity}"
            )
        each = f"--nproc-per-node {needs.devices} --max-restarts {MAX_RESTARTS}"
        return f"torchrun {nodes} {each} -m {verb}"


class Platform(Protocol):
    """What a platform's file has."""

    TEMPLATES: dict[str, str]

    def check(self, job: Job) -> None: ...
    def values(self, job: Job) -> dict[str, Any]: ...
    def next_steps(self, job: Job) -> list[str]: ...


def make_job(
    recipe: Recipe, candidates: Sequence[Needs], unfit: dict[str, str], image: str | None
) -> Job:
    """Raises UserError for a run folder that would lie outside of the job's, and as `carry`."""
    output = Path(recipe.output_dir)
    if not output.is_absolute() and (".." in output.parts or len(output.parts) < 2):
        raise UserError(
            f"output_dir: {recipe.output_dir} is to be a folder in a folder of the job, such as "
            "runs/my-run, or an absolute path on the machines that it runs on"
        )
    return Job(recipe, candidates, carry(recipe), unfit, image)


def need_shared_folder(job: Job, platform: str) -> None:
    """Raises UserError where several nodes would write checkpoints that none of them sees whole."""
    if job.needs.nodes > 1 and not Path(job.output).is_absolute():
        raise UserError(
            f"output_dir: {job.output} is on the disk of each node of {platform}, and a run of "
            f"{job.needs.nodes} nodes goes on from checkpoints that all of them see; set "
            "output_dir to an absolute path on a file system that they share"
        )


def write_job(job: Job, platform: Platform, folder: Path) -> list[str]:
    """The names of the files that were written, those of the data and of the package left out.

    Raises UserError for a folder that is not empty, and for what the platform cannot do.
    """
    platform.check(job)
    shared = {
        "job": job,
        "needs": job.needs,
        "version": __version__,
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "port": PORT,
        "facts": summary(job),
    }
    values = shared | platform.values(job)
    with written_aside(folder) as aside:
        write_carried(job.carried, aside)
        for name, template in platform.TEMPLATES.items():
            write_text(aside / name, _templates().get_template(template).render(values))
        content = [needs.to_dict() for needs in job.candidates]
        write_text(aside / "plan.json", json.dumps(content, indent=2) + "\n")
        names = sorted(path.name for path in aside.iterdir() if path.is_file())
    return names


def summary(job: Job) -> list[str]:
    """What the head of each file says, a line each."""
    needs = job.needs
    devices = f"{needs.nodes} x {needs.devices} {needs.device}"
    cost = "" if needs.cost is None else f", about {needs.cost:,.2f} at {needs.price:,.2f} an hour"
    return [
        f"llamaweft {__version__}: {job.name} on {devices} ({needs.layout}).",
        f"By its data sheet, not measured: {needs.peak_bytes / 2**30:.1f} of "
        f"{needs.usable_bytes / 2**30:.1f} GiB of a device,",
        f"{needs.seconds / 3600:.2f} hours of training{cost}; ended after "
        f"{needs.limit_seconds / 3600:.2f} hours.",
    ]


def _templates() -> Environment:
    made = Environment(
        loader=PackageLoader("llamaweft.jobs", "."),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    made.filters["yaml"] = json.dumps  # a JSON text is one of YAML, and of Python
    made.filters["shell"] = shlex.quote
    return made
