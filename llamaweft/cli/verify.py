"""`llamaweft verify`: proofs on this machine, with a recipe and data of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from llamaweft.cli.terminal import JsonFlag, out, print_json, say, table
from llamaweft.errors import RunError
from llamaweft.recipe import Recipe

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Prove on this machine what is promised.",
)


@app.callback()
def _verify() -> None:
    """Prove on this machine what is promised."""


@app.command()
def resume(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides.")
    ] = None,
    steps: Annotated[
        int, typer.Option(help="Steps before the interruption, and after it.", min=1)
    ] = 2,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Prove it for a sweep: KEY=VALUE,VALUE as in train.")
    ] = False,
    json_output: JsonFlag = False,
) -> None:
    """A run that is killed and resumed equals one that never was, bit for bit: in the midst of an
    epoch, of an accumulation and after an epoch's end. Exits with 1 where it does not."""
    from llamaweft.verify.resume import verify_resume, verify_sweep_resume

    if sweep:
        from llamaweft.sweep import split_axes

        fixed, axes = split_axes(overrides or [])
        content = verify_sweep_resume(Recipe.load(recipe, fixed), axes, steps, say)
    else:
        content = verify_resume(Recipe.load(recipe, overrides or []), steps, say)
    if json_output:
        print_json(content)
    else:
        show(content)
    if not content["passed"]:
        raise RunError(failure(content))


def show(content: dict[str, Any]) -> None:
    k = content["steps"]
    shown = table(
        f"{2 * k} steps, and {k} + {k} with an interruption between",
        *("case", "interrupted", "steps", "packs", "tensors", ""),
    )
    for case in content["cases"]:
        if case["passed"] is None:
            shown.add_row(case["case"], case["interrupted"], "", "", "", "not applicable")
            continue
        result = "[green]identical[/green]" if case["passed"] else "[bold red]differs[/bold red]"
        counts = (str(case[key]) for key in ("steps", "packs", "tensors"))
        shown.add_row(escape(case["case"]), escape(case["interrupted"]), *counts, result)
    out.print(shown)
    for difference in differences(content):
        out.print(escape(difference))


def differences(content: dict[str, Any]) -> list[str]:
    """Of every case."""
    return [
        f"{case['case']}: {difference}"
        for case in content["cases"]
        for difference in case.get("differences", [])
    ]


def failure(content: dict[str, Any]) -> str:
    first, *others = differences(content)
    more = f" (and {len(others)} more differences)" if others else ""
    return (
        f"a resumed run is not the uninterrupted one: {first}{more}; both runs are kept in "
        f"{content['folder']}"
    )
