"""`llamaweft plan`: memory, time and tokens of a run, before it starts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from llamaweft.cli.terminal import JsonFlag, duration, facts, gib, out, print_json
from llamaweft.recipe import Recipe

app = typer.Typer(add_completion=False)


@app.command()
def plan(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides.")
    ] = None,
    json_output: JsonFlag = False,
) -> None:
    """Peak memory by part, seconds a step, total time and tokens; what was chosen and why."""
    from llamaweft.pipeline import Pipeline

    content = Pipeline(Recipe.load(recipe, overrides or [])).plan().to_dict()
    if json_output:
        print_json(content)
    else:
        print_plan(content)


def print_plan(content: dict[str, Any]) -> None:
    parts = [f"{gib(size)} {name}" for name, size in content["parts"].items()]
    verdict = "fits" if content["fits"] else "does not fit"
    out.print(
        facts(
            "The plan",
            {
                **content["decisions"],
                "memory": f"{gib(content['peak_bytes'])} at its peak, {verdict} in "
                f"{gib(content['budget_bytes'])} ({', '.join(parts)})",
                "length": f"{content['steps']} steps, {content['tokens']:,} tokens, "
                f"{content['packs_per_epoch']} packs an epoch",
                "time": f"about {duration(content['total_seconds'])}, "
                f"{content['seconds_per_step']:.2f} s a step (training alone, at "
                f"{content['flops_per_second'] / 1e9:.0f} GFLOP/s measured)",
            },
        )
    )
