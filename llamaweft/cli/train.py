"""`llamaweft train`: run a recipe."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

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
from llamaweft.parallel.environment import World, node_of, world_of
from llamaweft.parallel.launch import launch_ranks
from llamaweft.recipe import Recipe, describe
from llamaweft.settings import Parallel
from llamaweft.train.events import StopRequest

if TYPE_CHECKING:
    from llamaweft.parallel.ranks import Ranks

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
    sweep: Annotated[
        bool,
        typer.Option(
            "--sweep",
            help="Train a run for each combination of KEY=VALUE,VALUE on one base, and rank them.",
        ),
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint, if any.")
    ] = False,
    nproc: Annotated[
        int, typer.Option(help="Processes on this machine: the product of `parallel`.", min=1)
    ] = 1,
    json_output: JsonFlag = False,
) -> None:
    """Run a recipe. Ctrl-C saves a checkpoint and exits; --resume goes on."""
    loaded = None if sweep else Recipe.load(recipe, overrides or [])
    world, node = world_of(os.environ), node_of(os.environ)
    processes = nproc if nproc > 1 or node is None else node.processes or 1
    here = processes * (1 if node is None else node.count)
    if loaded is None:
        if here > 1 or (world is not None and world.world > 1):
            raise UserError("--sweep trains its runs in one process; leave out --nproc or --sweep")
        _sweep(recipe, overrides or [], resume, json_output)
    elif world is not None and world.world > 1:
        _train_as_rank(world, loaded, resume or world.restarts > 0, json_output)
    elif here > 1:
        flags = [f for f, given in (("--resume", resume), ("--json", json_output)) if given]
        arguments = ["train", str(recipe), *(overrides or []), *flags]
        raise typer.Exit(launch_ranks(arguments, processes, node))
    else:
        _exit_if_stopped([_train(loaded, None, resume, json_output)])


def _train_as_rank(world: World, loaded: Recipe, resume: bool, json_output: bool) -> None:
    from llamaweft.layouts import device_kind, layout_of
    from llamaweft.parallel.processes import joined

    kind, keys = device_kind(loaded), loaded.parallel
    seconds = Parallel().timeout_seconds if keys == "auto" else keys.timeout_seconds
    with joined(
        world, lambda: layout_of(loaded, world.world, world.local_world), kind, seconds
    ) as ranks:
        reason = _train(loaded, ranks, resume, json_output)
    _exit_if_stopped([reason])


def _train(loaded: Recipe, ranks: Ranks | None, resume: bool, json_output: bool) -> str:
    """Returns why the run ended."""
    from llamaweft.layouts import layout_of
    from llamaweft.parallel.layout import check_world
    from llamaweft.pipeline import Pipeline

    if ranks is None:
        check_world(layout_of(loaded)[0], 1)
    pipeline = Pipeline(loaded) if ranks is None else Pipeline(loaded, ranks)
    result = run_with_progress(pipeline, resume=resume)
    if pipeline.ranks.first and json_output:
        print_json(result)
    elif pipeline.ranks.first:
        print_result(pipeline, result)
    return str(result["reason"])


def _exit_if_stopped(reasons: Sequence[str]) -> None:
    """Exit as a run does that was asked to stop, where one was."""
    for handled, code in STOPPED.items():
        if handled.name in reasons:
            raise typer.Exit(code)


def _sweep(recipe: Path, overrides: Sequence[str], resume: bool, json_output: bool) -> None:
    from llamaweft.sweep import Sweep, split_axes

    fixed, axes = split_axes(overrides)
    loaded = Recipe.load(recipe, fixed)
    sweep = Sweep(loaded, axes)
    first = sweep.runs[0].pipeline
    with stopping() as stop, TrainingProgress() as progress:
        first.on_rows, first.say = progress.rows, progress.say
        content = sweep.train(
            resume=resume,
            listeners=lambda name: [progress.named(name)],
            stop=stop,
            say=progress.say,
            progress=progress.answers,
        )
    if json_output:
        print_json(content)
    else:
        _print_sweep(content)
    _exit_if_stopped([run["reason"] for run in content["runs"]])


def _print_sweep(content: dict[str, Any]) -> None:
    """The runs, the best first."""
    from llamaweft.evaluate.report import metric_table

    metric = content["metric"]
    shown = table(f"By {metric} on held-out rows", "", "run", metric, "against the best", "step")
    for rank, run in enumerate(content["runs"], 1):
        if "metrics" not in run:
            shown.add_row("", escape(Path(run["folder"]).name), run["reason"], "", str(run["step"]))
            continue
        side = {"name": "", "before": {"metrics": run["metrics"]}, "after": None}
        value = next(row[1] for row in metric_table(side) if row[0] == metric)
        verdict = run.get("difference", {}).get("verdict", "" if rank == 1 else "other rows")
        name = Path(run["folder"]).name
        shown.add_row(str(rank), *(escape(c) for c in (name, value, verdict, str(run["step"]))))
    out.print(shown)


@contextmanager
def stopping() -> Iterator[StopRequest]:
    """The first signal asks to stop, a second one ends the process."""
    stop = StopRequest()

    def on_signal(number: int, frame: FrameType | None) -> None:
        stop(signal.Signals(number).name)
        for handled, previous in before.items():
            signal.signal(handled, previous)

    before = {handled: signal.signal(handled, on_signal) for handled in STOPPED}
    try:
        yield stop
    finally:
        for handled, previous in before.items():
            signal.signal(handled, previous)


def run_with_progress(pipeline: Any, *, resume: bool = False) -> dict[str, Any]:
    """Train with bars on stderr; the first signal asks the run to stop, a second one ends it."""
    with stopping() as stop, TrainingProgress(shown=pipeline.ranks.first) as progress:
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
    shown = folder.adapter if folder.adapter.exists() else folder.model
    if result["evaluation"]:
        print_evaluation(result["evaluation"])
        print_forgetting(result["evaluation"], str(shown))
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

    rows = metric_table(content)
    if not rows:  # general prompts alone were measured
        return
    shown = table(f"On {content['name']}", "metric", before, after, "")
    for row in rows:
        shown.add_row(*(escape(cell) for cell in row))
    out.print(shown)


def print_forgetting(content: dict[str, Any], weights: str) -> None:
    """What was forgotten, by area, and what a person should know of it."""
    from llamaweft.evaluate.forgetting import forgetting_notes
    from llamaweft.evaluate.report_forgetting import COLUMNS, forgetting_view

    view = forgetting_view(content.get("forgetting"))
    if view is None:
        return
    shown = table(f"Forgetting, on {view['summary']}", *(column.lower() for column in COLUMNS))
    for row in view["rows"]:
        shown.add_row(*(escape(cell.partition(" [")[0]) for cell in row))  # intervals: the report
    out.print(shown)
    for note in forgetting_notes(content["forgetting"], weights):
        err.print(f"[yellow]{escape(note)}[/yellow]")
