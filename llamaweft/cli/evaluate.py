"""`llamaweft evaluate`: measure a run or a model on held-out rows, and compare two."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from llamaweft.cli.terminal import JsonFlag, TrainingProgress, print_json
from llamaweft.cli.train import print_evaluation

app = typer.Typer(add_completion=False)


@app.command()
def evaluate(
    subject: Annotated[str, typer.Argument(metavar="RUN_OR_MODEL", help="What is measured.")],
    compare: Annotated[
        str | None, typer.Option(metavar="BASE", help="A run or model to compare with.")
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="Whose held-out rows and metrics; default: the run's own.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Other rows: a file.")] = None,
    metrics: Annotated[str | None, typer.Option(help="Metrics, separated by commas.")] = None,
    output: Annotated[Path | None, typer.Option(help="Also write the result to a file.")] = None,
    json_output: JsonFlag = False,
) -> None:
    """Held-out loss and task metrics, with 95% intervals."""
    from llamaweft.subject import compare_subjects
    from llamaweft.train.run_folder import write_json

    with TrainingProgress() as progress:
        content = compare_subjects(
            subject,
            compare,
            recipe=recipe,
            data=data,
            metrics=metrics.split(",") if metrics else None,
            say=progress.say,
            progress=progress.answers,
        )
    if output is not None:
        write_json(output, content)
    if json_output:
        print_json(content)
    else:
        show(content, subject, compare)


def show(content: dict[str, Any], subject: str, compare: str | None) -> None:
    if compare is None:
        print_evaluation({**content, "after": None}, subject)
    else:
        print_evaluation(content, compare, subject)
