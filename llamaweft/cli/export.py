"""`llamaweft export`: the trained model for other programs, with proof."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from llamaweft.cli.terminal import JsonFlag, out, print_json, say

app = typer.Typer(add_completion=False)


class Target(StrEnum):
    hf = "hf"
    peft = "peft"


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    to: Annotated[Target, typer.Option(help="hf: one merged folder. peft: the adapter.")],
    output: Annotated[Path, typer.Option(help="The folder to write; new or empty.")],
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Skip the proof that it answers alike.")
    ] = False,
    json_output: JsonFlag = False,
) -> None:
    """Write the trained model for other programs, and prove that it answers like the live one."""
    from llamaweft.subject import export_run

    say(f"exporting {run} to {output}")
    parity = export_run(run, str(to), output, verify=not no_verify)
    content: dict[str, Any] = {"output": str(output), "parity": parity and parity.to_dict()}
    if json_output:
        print_json(content)
    else:
        print_export(content)


def print_export(content: dict[str, Any]) -> None:
    parity = content["parity"]
    if parity is None:
        out.print(f"wrote {content['output']}; not verified")
        return
    out.print(
        f"wrote {content['output']}; opened with {parity['consumer']}: logits differ by "
        f"{parity['relative_difference']:.1e} in norm (allowed {parity['tolerance']:.0e}), "
        f"{parity['same_greedy_tokens']:.1%} of {parity['tokens']} greedy tokens are the same"
    )
