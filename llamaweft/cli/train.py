"""`llamaweft train`: run a recipe."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.markup import escape

from llamaweft.cli.terminal import (
    JsonFlag,
    TrainingProgress,
    err,
    facts,
    out,
    print_json,
    table,
)
from llamaweft.errors import UserError
from llamaweft.recipe import Recipe, describe
from llamaweft.train.events import StopRequest

STOPPED = {signal.SIGINT: 130, signal.SIGTERM: 143}
"""Exit codes of a run that was asked to stop and saved."""

app = typer.Typer(rich_markup_mode=None, add_completion=False)

_KEYS = "\n\n".join(f"{key}: {text}" for key, text in describe().items())


@app.command(epilog=f"Keys of a recipe, with their defaults:\n\n{_KEYS}")
def train(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, as training.seed=1."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint, if any.")
    ] = False,
    nproc: Annotated[
        int, typer.Option(help="Processes: the product of the recipe's parallel.")
    ] = 1,
    json_output: JsonFlag = False,
) -> None:
    """Run a recipe. Ctrl-C saves a checkpoint and exits; --resume goes on."""
    from llamaweft.pipeline import Pipeline

    loaded = Recipe.load(recipe, overrides or [])
    if nproc != 1:
        raise UserError(
            f"--nproc {nproc}: a recipe with parallel: {loaded.parallel} runs in 1 process; "
            "leave --nproc out"
        )
    pipeline = Pipeline(loaded)
    result = run_with_progress(pipeline, resume=resume)
    if json_output:
        print_json(result)
    else:
        print_result(pipeline, result)
    if result["reason"] in {s.name for s in STOPPED}:
        raise typer.Exit(STOPPED[signal.Signals[result["reason"]]])


def run_with_progress(pipeline: Any, *, resume: bool = False) -> dict[str, Any]:
    """Train with bars on stderr; the first signal asks the run to stop, a second one ends it."""
    stop = StopRequest()

    def on_signal(number: int, frame: FrameType | None) -> None:
        stop(signal.Signals(number).name)
        for handled, previous in before.items():
            signal.signal(handled, previous)

    before = {handled: signal.signal(handled, on_signal) for handled in STOPPED}
    try:
        with TrainingProgress() as progress:
            first_lines_said = False
            pipeline.on_rows, pipeline.say = progress.rows, progress.say

            def say(text: str) -> None:
                nonlocal first_lines_said
                if text.startswith("loading the model") and not first_lines_said:
                    first_lines_said = True
                    for name, decision in pipeline.decisions().items():
                        progress.say(f"{name}: {decision}")
                progress.say(text)

            return pipeline.train(
                resume=resume,
                listeners=[progress],
                stop=stop,
                say=say,
                progress=progress.answers,
            )
    finally:
        for handled, previous in before.items():
            signal.signal(handled, previous)


def print_result(pipeline: Any, result: dict[str, Any]) -> None:
    folder = pipeline.run_folder
    if result["reason"] in {s.name for s in STOPPED}:
        err.print(
            f"stopped by {result['reason']} and saved after step {result['step']}; go on with the "
            "same command and --resume"
        )
        return
    if result["reason"] == "max_seconds":
        err.print(
            f"stopped by training.max_seconds and saved after step {result['step']}; raise it and "
            "--resume to go on"
        )
    if result["evaluation"]:
        print_evaluation(result["evaluation"])
    shown = folder.adapter if folder.adapter.exists() else folder.model
    use = "measure it" if pipeline.head is not None else "talk to it"
    verb = "evaluate" if pipeline.head is not None else "chat"
    out.print(
        facts(
            "The run",
            {
                "folder": folder.root,
                "weights": shown,
                "report": folder.report_html,
                use: f"llamaweft {verb} {folder.root}",
            },
        )
    )


def print_evaluation(content: dict[str, Any], before: str = "before", after: str = "after") -> None:
    """The metric table, with the verdicts of the paired test."""
    from llamaweft.evaluate.report import metric_table

    shown = table(f"On {content['name']}", "metric", before, after, "")
    for row in metric_table(content):
        shown.add_row(*(escape(cell) for cell in row))
    out.print(shown)
