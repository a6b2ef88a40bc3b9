"""`llamaweft export`: the trained model for other programs, with proof."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from llamaweft.cli.terminal import JsonFlag, out, print_json, say

app = typer.Typer(add_completion=False)


class Target(StrEnum):
    hf = "hf"
    peft = "peft"
    gguf = "gguf"
    ollama = "ollama"
    head = "head"


class MergeInto(StrEnum):
    auto = "auto"
    original = "original"
    dequantised = "dequantised"


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    to: Annotated[
        Target,
        typer.Option(
            help="hf: one merged folder. peft: the adapter. gguf: one file for llama.cpp. ollama: "
            "that with a Modelfile. head: a head alone."
        ),
    ],
    output: Annotated[Path, typer.Option(help="The folder to write; new or empty.")],
    merge_into: Annotated[
        MergeInto,
        typer.Option(
            help="The base's original weights, or those that training held in a codec. auto: the "
            "original ones where they are at hand."
        ),
    ] = MergeInto.auto,
    quantization: Annotated[
        str | None,
        typer.Option(
            help="Of a GGUF: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1 or q4_0; left out: q8_0."
        ),
    ] = None,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Skip the proof that it answers alike.")
    ] = False,
    json_output: JsonFlag = False,
) -> None:
    """Write the trained model for other programs, and prove that it answers like the live one."""
    from llamaweft.subject import export_run

    say(f"exporting {run} to {output}")
    parity = export_run(
        run,
        str(to),
        output,
        verify=not no_verify,
        merge_into=str(merge_into),
        quantization=quantization,
        say=say,
    )
    content: dict[str, Any] = {"output": str(output), "parity": parity and parity.to_dict()}
    if json_output:
        print_json(content)
    else:
        print_export(content)


def print_export(content: dict[str, Any]) -> None:
    parity = content["parity"]
    if parity is None:
        out.print(escape(f"wrote {content['output']}; not verified"))
        return
    said = (
        f"wrote {content['output']}; opened with {parity['consumer']}: logits differ from "
        f"{parity['compared_with']} by {parity['relative_difference']:.1e} in norm (allowed "
        f"{parity['tolerance']:.0e}), {parity['same_greedy_tokens']:.1%} of {parity['tokens']} "
        "greedy tokens are the same"
    )
    if parity["kl_to_live"] is not None:
        said += f"; KL from the model as it was trained {parity['kl_to_live']:.1e} nats"
    if parity["texts"]:
        said += f"; {parity['texts']} texts have the same ids"
    out.print(escape(said))
