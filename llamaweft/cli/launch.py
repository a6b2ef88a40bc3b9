"""`llamaweft launch`: a ready job for a platform, in a folder of its own."""

from __future__ import annotations

from enum import StrEnum
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from llamaweft.cli.terminal import JsonFlag, duration, facts, gib, out, print_json, say
from llamaweft.errors import UserError
from llamaweft.recipe import Recipe

app = typer.Typer(rich_markup_mode=None, add_completion=False)


class On(StrEnum):
    slurm = "slurm"
    kubernetes = "kubernetes"
    skypilot = "skypilot"
    sagemaker = "sagemaker"
    docker = "docker"


@app.command()
def launch(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    on: Annotated[On, typer.Option("--on", help="The platform.")],
    write: Annotated[Path, typer.Option(help="The folder to write the job to; new or empty.")],
    device: Annotated[str, typer.Option(help="h100, a100, l4, t4, ...: what it runs on.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides.")
    ] = None,
    devices: Annotated[int, typer.Option(help="Devices of each node.", min=1, max=1024)] = 1,
    nodes: Annotated[int, typer.Option(help="Machines.", min=1, max=10_000)] = 1,
    price: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DEVICE=PRICE",
            help="What an hour of one device costs, as h100=2.99; again for each that may be used.",
        ),
    ] = None,
    image: Annotated[
        str | None,
        typer.Option(help="Name of the container image, as registry.example.com/me/job:1."),
    ] = None,
    json_output: JsonFlag = False,
) -> None:
    """Write a job: the recipe with its data, and what the platform starts it with. Nothing is sent
    anywhere. Devices, memory, disk and time are the plan's, by data sheets."""
    from llamaweft.jobs.job import make_job, write_job
    from llamaweft.jobs.needs import candidates

    if image is not None and on in (On.slurm, On.skypilot):
        raise UserError(f"--image {image}: a job --on {on} takes none; leave it out")
    loaded = Recipe.load(recipe, overrides or [])
    prices = _prices(price or [], device, on)
    platform: Any = import_module(f"llamaweft.jobs.{on}")
    say(f"planning {recipe} on {nodes} x {devices} {device}")
    found, unfit = candidates(loaded, device, devices, nodes, prices)
    job = make_job(loaded, found, unfit, image)
    files = write_job(job, platform, write)
    content = {
        "platform": str(on),
        "folder": str(write),
        "files": files,
        "data": {place: str(path) for place, path in job.carried.copies.items()},
        "needs": job.needs.to_dict(),
        "candidates": [needs.to_dict() for needs in found],
        "unfit": unfit,
        "next": platform.next_steps(job),
    }
    if json_output:
        print_json(content)
    else:
        print_job(content)


def _prices(given: list[str], device: str, on: On) -> dict[str, float]:
    """Raises UserError for what is no price, and for one that no table would show."""
    prices: dict[str, float] = {}
    for text in given:
        name, _, number = text.partition("=")
        try:
            prices[name.lower()] = float(number)
        except ValueError:
            raise UserError(
                f"--price {text}: write it as DEVICE=PRICE, such as h100=2.99"
            ) from None
        if not 0 <= prices[name.lower()] < 1e6:
            raise UserError(f"--price {text}: give what an hour of one device costs")
        if on != On.skypilot and name.lower() != device.lower():
            raise UserError(
                f"--price {text}: a job --on {on} runs on {device} alone; --on skypilot chooses "
                "among devices"
            )
    return prices


def print_job(content: dict[str, Any]) -> None:
    needs = content["needs"]
    rows = {
        "folder": content["folder"],
        "files": ", ".join(content["files"]),
        "copied": ", ".join(content["data"].values()) or "no data",
        "devices": f"{needs['nodes']} x {needs['devices']} {needs['device']}, {needs['layout']}",
        "memory": f"{gib(needs['peak_bytes'])} of {gib(needs['usable_bytes'])} of a device, "
        f"{gib(needs['host_bytes'])} of a host, {gib(needs['disk_bytes'])} of disk",
        "time": f"about {duration(needs['seconds'])} of training, by a data sheet; the platform "
        f"ends it after {duration(needs['limit_seconds'])}",
    }
    for other in content["candidates"]:
        if other["cost"] is not None:
            rows[f"cost on {other['device']}"] = (
                f"{other['cost']:,.2f} at {other['price']:,.2f} an hour, for "
                f"{duration(other['seconds'])}"
            )
    for name, why in content["unfit"].items():
        rows[f"not on {name}"] = why
    out.print(facts("The job", rows))
    out.print(escape(f"go on with: cd {content['folder']}"))
    for step in content["next"]:
        out.print(escape(f"  {step}"))
