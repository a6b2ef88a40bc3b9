"""`llamaweft demo`: the main job end to end, on the embedded model and data."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from llamaweft.cli.data import print_audit
from llamaweft.cli.doctor import examine, print_machine
from llamaweft.cli.export import print_export
from llamaweft.cli.plan import print_plan
from llamaweft.cli.terminal import (
    JsonFlag,
    TrainingProgress,
    duration,
    err,
    facts,
    out,
    print_json,
    table,
)
from llamaweft.cli.train import print_evaluation, run_with_progress
from llamaweft.errors import RunError, UserError
from llamaweft.recipe import Recipe

app = typer.Typer(add_completion=False)

RECIPE = Path(__file__).with_name("demo.yaml")
SHOWN = 5


@app.command()
def demo(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Overrides of the demo's recipe."),
    ] = None,
    json_output: JsonFlag = False,
) -> None:
    """From a spoken smart-home request to Home Assistant's JSON intent: look at the machine, plan,
    audit, measure, train, measure again, export with proof, report. In runs/demo."""
    from llamaweft.pipeline import Pipeline, write_run_report
    from llamaweft.subject import compare_subjects, export_run
    from llamaweft.train.run_folder import write_json

    began = time.perf_counter()
    recipe = Recipe.load(RECIPE, overrides or [])
    folder = Path(recipe.output_dir)
    _clear(folder)
    machine = examine()
    _heading(1, "the machine")
    if not json_output:
        print_machine(machine)
    _heading(2, "plan and audit (the first time the model and the data are made)")
    pipeline = Pipeline(recipe)
    plan = pipeline.plan()
    if not json_output:
        print_plan(plan.to_dict())
        print_audit(pipeline.data.audit.to_dict())
    _heading(3, "measure, train, measure again")
    result = run_with_progress(pipeline)
    if result["evaluation"] is None:
        raise RunError(f"the demo was stopped ({result['reason']}); call it again")
    _heading(4, "beside it: a random split, unseen sentences of templates seen in training")
    with TrainingProgress() as progress:
        beside = compare_subjects(
            str(folder),
            None,
            data="builtin:smart-home/random",
            say=progress.say,
            progress=progress.answers,
        )
    beside |= {
        "name": "a random split (templates seen in training)",
        "before": None,
        "after": beside["before"],
        "examples": [],
    }
    write_json(folder / "evaluation-random.json", beside)
    write_run_report(pipeline.run_folder)
    _heading(5, "export, each opened by the program it is for and compared with the live model")
    exports = {}
    for target in ("peft", "hf"):
        output = folder / "export" / target
        parity = export_run(folder, target, output)
        exports[target] = {"output": str(output), "parity": parity and parity.to_dict()}
        if not json_output:
            print_export(exports[target])
    seconds = time.perf_counter() - began
    content = {
        "machine": machine,
        "plan": plan.to_dict(),
        "evaluation": result["evaluation"],
        "evaluation_random": beside,
        "exports": exports,
        "seconds": seconds,
        "run": str(folder),
    }
    if json_output:
        print_json(content)
    else:
        _print_end(content, pipeline.run_folder.report_html)


def _clear(folder: Path) -> None:
    """Remove the demo's last run, and only such a one."""
    if not folder.exists():
        return
    if any(folder.iterdir()) and not (folder / "recipe.yaml").exists():
        raise UserError(
            f"{folder} holds something that is no run; move it away, or call from another folder"
        )
    shutil.rmtree(folder)


def _heading(number: int, text: str) -> None:
    err.print(f"\n[bold]{number}/5[/bold] {escape(text)}")


def _print_end(content: dict[str, Any], report: Path) -> None:
    out.print()
    print_answers(content["evaluation"]["examples"][:SHOWN])
    for measured in (content["evaluation"], content["evaluation_random"]):
        out.print()
        print_evaluation(measured)
    out.print()
    out.print(facts("Done", {"time": duration(content["seconds"]), "report": report}))
    out.print("\nTalk to it:")
    out.print(f"  llamaweft chat {content['run']}", style="bold", soft_wrap=True)


def print_answers(examples: list[dict[str, Any]]) -> None:
    """Requests with the answers before and after, each on lines of its own."""
    shown = table("Requests it has not seen", "", "")
    shown.show_header = False
    for example in examples:
        right = example["after"].strip() == example["reference"].strip()
        style = "green" if right else "red"
        before = " ".join(example["before"].split())
        shown.add_row("[bold]request[/bold]", f"[bold]{escape(example['prompt'])}[/bold]")
        shown.add_row("before", f"[dim]{escape(before[:120])}[/dim]")
        shown.add_row("after", f"[{style}]{escape(example['after'])}[/{style}]")
        if not right:
            shown.add_row("expected", escape(example["reference"]))
        shown.add_section()
    out.print(shown)
