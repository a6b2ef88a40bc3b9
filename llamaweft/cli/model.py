"""`llamaweft model init|convert|inspect`: make, convert or look into a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from llamaweft.cli.terminal import JsonFlag, counted, facts, out, print_json
from llamaweft.errors import UserError

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Make, convert or inspect a model folder."
)


@app.command()
def init(
    preset: Annotated[str, typer.Argument(help="llama3-8b, llama3.1-8b, llama3.2-1b, ... tiny")],
    folder: Annotated[Path, typer.Argument(help="The folder to write; new or empty.")],
    tokenizer: Annotated[
        str, typer.Option(help="Hub id, folder, tokenizer.model or builtin:smollm2-135m.")
    ],
    random: Annotated[bool, typer.Option("--random", help="Random weights.")] = False,
    base_weights: Annotated[
        str, typer.Option(help="nf4, int8, bf16, fp32; none: no weights.")
    ] = "fp32",
    seed: Annotated[int, typer.Option(help="Seed of the weights.", min=0)] = 0,
    json_output: JsonFlag = False,
) -> None:
    """A model of a known shape with random weights, for measuring and for tests; or without any,
    for planning."""
    from llamaweft.model.init import NO_WEIGHTS, init_random

    if random and base_weights == NO_WEIGHTS:
        raise UserError("--random and --base-weights none contradict; remove one of them")
    if not random and base_weights != NO_WEIGHTS:
        raise UserError("only random weights can be made; say --random, or --base-weights none")
    with counted("writing tensors") as progress:
        config = init_random(preset, folder, tokenizer, base_weights, seed, progress)
    content = {"folder": str(folder), "preset": preset, **config.to_dict()}
    print_json(content) if json_output else out.print(escape(f"wrote {folder}"))


@app.command()
def convert(
    source: Annotated[
        Path,
        typer.Argument(
            help="A .gguf file, Meta's folder (consolidated.*.pth), or a folder with "
            "pytorch_model.bin."
        ),
    ],
    folder: Annotated[Path, typer.Argument(help="The folder to write; new or empty.")],
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Of Meta's folder, where none is in it: hub id, folder or file."),
    ] = None,
    json_output: JsonFlag = False,
) -> None:
    """A model in another form as a Hugging Face folder of safetensors."""
    from llamaweft.model.convert import convert as write

    write(source, folder, tokenizer)
    print_json({"folder": str(folder)}) if json_output else out.print(escape(f"wrote {folder}"))


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="Folder, hub id, .gguf or builtin model.")],
    revision: Annotated[
        str | None, typer.Option(help="Commit, tag or branch of a hub model.")
    ] = None,
    json_output: JsonFlag = False,
) -> None:
    """What is in a model folder: shape, parameters, dtype, tokenizer."""
    from llamaweft.model.folder import DTYPE_NAMES, read_config, tensor_files
    from llamaweft.model.locate import find_folder
    from llamaweft.model.presets import parameter_count
    from llamaweft.model.stores import own_codec
    from llamaweft.model.tokenizer import load_tokenizer

    folder = find_folder(model, revision)
    config = read_config(folder)
    tokenizer = load_tokenizer(folder)
    codec = own_codec(folder)
    dtypes = [codec] if codec else sorted({DTYPE_NAMES[t.dtype] for t in tensor_files(folder)})
    content = {
        "folder": str(folder),
        "parameters": parameter_count(config),
        "dtypes": dtypes,
        "tokens": len(tokenizer),
        "chat_template": bool(tokenizer.chat_template),
        **config.to_dict(),
    }
    print_json(content) if json_output else out.print(facts(model, content))
