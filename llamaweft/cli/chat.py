"""`llamaweft chat`: talk to a run or a model in the terminal."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from llamaweft.cli.terminal import JsonFlag, err, print_json, say
from llamaweft.shown import printable

app = typer.Typer(add_completion=False)


@app.command()
def chat(
    subject: Annotated[str, typer.Argument(metavar="RUN_OR_MODEL", help="Who answers.")],
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    message: Annotated[
        str | None, typer.Option(help="Ask this one thing, print the answer and end.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.", min=0)] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="Draw from this much probability.", min=0, max=1)
    ] = 1,
    top_k: Annotated[int, typer.Option(help="Draw from so many tokens; 0: all.", min=0)] = 0,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.", min=1)] = 512,
    seed: Annotated[int, typer.Option(help="Seed of the drawing.", min=0)] = 0,
    json_output: JsonFlag = False,
) -> None:
    """Talk to a run or a model. /new starts anew, /quit or Ctrl-D ends."""
    import torch

    from llamaweft.data.chat import stop_ids
    from llamaweft.generate.chat import Chat
    from llamaweft.generate.sampling import Sampling
    from llamaweft.subject import open_subject

    say(f"loading {subject}")
    opened = open_subject(subject)
    talk = Chat(
        opened.generates,
        opened.pipeline.tokenizer,
        stop_ids=stop_ids(opened.pipeline.tokenizer),
        system=system if system is not None else opened.usual_system(),
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature, top_p, top_k),
        generator=torch.Generator(opened.model.device).manual_seed(seed),
    )
    if message is not None:
        answer = _answer(talk, message, shown=not json_output)
        if json_output:
            print_json({"message": message, "answer": answer})
        return
    if talk.system:
        say(f"system message: {talk.system}")
    err.print("[dim]/new starts anew, /quit or Ctrl-D ends[/dim]")
    while (text := _read()) is not None:
        if text == "/new":
            talk.restart()
        elif text:
            _answer(talk, text, shown=True)


def _read() -> str | None:
    """A line from the person; None at the end."""
    try:
        text = input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
    return None if text == "/quit" else text


def _answer(talk: Any, text: str, *, shown: bool) -> str:
    """Print the answer as it comes. Ctrl-C ends the answer, not the chat."""
    parts = []
    try:
        for part in talk.ask(text):
            parts.append(part)
            if shown:
                typer.echo(printable(part), nl=False)
    except KeyboardInterrupt:
        talk.restart()
        say("stopped; the chat starts anew")
    if shown:
        typer.echo()
    return "".join(parts)
