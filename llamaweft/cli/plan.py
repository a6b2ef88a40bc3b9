"""`llamaweft plan`: memory, time and tokens of a run, before it starts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from llamaweft.cli.terminal import JsonFlag, duration, facts, gib, out, print_json
from llamaweft.recipe import Recipe

app = typer.Typer(rich_markup_mode=None, add_completion=False)


@app.command()
def plan(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="h100, a100, l4, t4, ...: by its data sheet, not measured.")
    ] = None,
    price_per_hour: Annotated[
        float | None, typer.Option(help="What an hour costs; the plan says the run's cost.", min=0)
    ] = None,
    json_output: JsonFlag = False,
) -> None:
    """Peak memory by part, seconds a step, total time and tokens; what was chosen and why."""
    from llamaweft.pieces.pieces import Pieces
    from llamaweft.plan.devices import find_device
    from llamaweft.planning import PiecesFor, plan_run

    loaded = Recipe.load(recipe, overrides or [])
    pieces = PiecesFor(loaded, find_device(device)) if device else Pieces(loaded)
    content = plan_run(pieces, price_per_hour).to_dict()
    if json_output:
        print_json(content)
    else:
        print_plan(content)


def print_plan(content: dict[str, Any]) -> None:
    parts = [f"{gib(size)} {name}" for name, size in content["parts"].items() if size]
    shares = [f"{s / content['seconds_per_step']:.0%} {n}" for n, s in content["seconds"].items()]
    verdict = "fits" if content["fits"] else "does not fit"
    rows = {
        **content["decisions"],
        "memory": f"{gib(content['peak_bytes'])} at its peak, {verdict} in "
        f"{gib(content['budget_bytes'])} ({', '.join(parts)})",
        "length": f"{content['steps']} steps, {content['tokens']:,} tokens, "
        f"{content['packs_per_epoch']} packs an epoch",
        "time": f"about {duration(content['total_seconds'])}, "
        f"{content['seconds_per_step']:.2f} s a step, {content['tokens_per_second']:.1f} tokens/s: "
        f"training alone ({', '.join(shares)})",
        "speed": f"{content['speed']['product_flops'] / 1e9:,.0f} GFLOP/s of the base's products, "
        f"{content['speed']['source']}",
    }
    if content["cost"] is not None:
        rows["cost"] = f"{content['cost']:,.2f} at {content['price_per_hour']:,.2f} an hour"
    for number, warning in enumerate(content["warnings"], start=1):
        rows[f"note {number}"] = warning
    out.print(facts("The plan", rows))
