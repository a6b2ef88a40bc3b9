"""`llamaweft predict`: a file of prompts in, a file of answers out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from llamaweft.cli.terminal import JsonFlag, counted, out, print_json, say

app = typer.Typer(rich_markup_mode=None, add_completion=False)


@app.command()
def predict(
    subject: Annotated[str, typer.Argument(metavar="RUN_OR_MODEL", help="Who answers.")],
    prompts: Annotated[
        str, typer.Argument(help="Chats or prompts, or rows for a head; own answers are left out.")
    ],
    output: Annotated[Path, typer.Option(help="The JSONL file of answers to write.")],
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Longest answer in tokens; 512 if left out.", min=1)
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the answers of a call that was stopped.")
    ] = False,
    json_output: JsonFlag = False,
) -> None:
    """Greedy answers to a file of prompts, or what a head says of each, as lines of JSON."""
    from llamaweft.data.sources import read_path
    from llamaweft.predictions import predict as answer
    from llamaweft.predictions import read_prompts
    from llamaweft.subject import open_subject

    rows = read_prompts(subject, read_path(prompts), max_new_tokens)
    say(f"loading {subject}")
    opened = open_subject(subject)
    with counted("answering") as progress:
        made = answer(
            opened, rows, output, max_new_tokens=max_new_tokens, resume=resume, progress=progress
        )
    content = {"output": str(output), "answers": len(rows), "made_now": made}
    wrote = escape(f"wrote {len(rows)} answers to {output}")
    print_json(content) if json_output else out.print(wrote)
