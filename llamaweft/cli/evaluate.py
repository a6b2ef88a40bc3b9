"""`llamaweft evaluate`: measure a run or a model on held-out rows, and compare two."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from llamaweft.cli.terminal import JsonFlag, TrainingProgress, print_json
from llamaweft.cli.train import print_evaluation
from llamaweft.errors import UserError

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
    tasks: Annotated[
        str | None,
        typer.Option(help="Tasks of lm-evaluation-harness, separated by commas, and not own rows."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Rows of each task.", min=1)] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Answered examples before each row of a task.", min=0)
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where further tasks are.")
    ] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Write a task's prompts as chats.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="Also write the result to a file.")] = None,
    json_output: JsonFlag = False,
) -> None:
    """Held-out loss and task metrics, with 95% intervals."""
    from llamaweft.train.run_folder import write_json

    of_rows = {"--recipe": recipe, "--data": data, "--metrics": metrics}
    of_tasks = {
        "--limit": limit,
        "--num-fewshot": num_fewshot,
        "--include-path": include_path,
        "--apply-chat-template": apply_chat_template or None,
    }
    _check_options(of_rows if tasks is not None else of_tasks, tasks)
    with TrainingProgress() as progress:
        told: dict[str, Any] = {"say": progress.say, "progress": progress.answers}
        if tasks is not None:
            from llamaweft.harness_run import compare_on_tasks

            content = compare_on_tasks(
                subject,
                compare,
                [name.strip() for name in tasks.split(",")],
                limit=limit,
                num_fewshot=num_fewshot,
                include_path=include_path,
                apply_chat_template=apply_chat_template,
                **told,
            )
        else:
            from llamaweft.subject import compare_subjects

            content = compare_subjects(
                subject,
                compare,
                recipe=recipe,
                data=data,
                metrics=metrics.split(",") if metrics else None,
                **told,
            )
    if output is not None:
        write_json(output, content)
    if json_output:
        print_json(content)
    else:
        show(content, subject, compare)


def _check_options(unused: dict[str, Any], tasks: str | None) -> None:
    """Raises UserError for an option that would change nothing."""
    given = [name for name, value in unused.items() if value is not None]
    if given:
        why = "is for rows of your own" if tasks is not None else "is for --tasks"
        raise UserError(f"{given[0]} {why}; leave it out, or give it in another call")


def show(content: dict[str, Any], subject: str, compare: str | None) -> None:
    if compare is None:
        print_evaluation({**content, "after": None}, subject)
    else:
        print_evaluation(content, compare, subject)
