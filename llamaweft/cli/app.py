"""The verbs, and how each way to end becomes an exit code: 0, 2 (a user's mistake) or 1.

A verb's file is imported only when the verb is called, so that `--help` needs no torch.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from importlib import import_module
from typing import Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from llamaweft import __version__
from llamaweft.errors import RunError, UserError
from llamaweft.files import disk_is_full
from llamaweft.shown import printable, redacted

VERBS = {
    "demo": "The main job end to end, on the embedded model and data.",
    "doctor": "What this machine is and can run.",
    "plan": "Memory, time and tokens of a run, before it starts.",
    "data": "Show rows as the model will see them, or audit them.",
    "train": "Run a recipe.",
    "launch": "Write a ready job for a cluster or a cloud.",
    "verify": "Prove on this machine what is promised.",
    "evaluate": "Measure a run or a model on held-out rows.",
    "chat": "Talk to a run or a model in the terminal.",
    "predict": "A file of prompts in, a file of answers out.",
    "export": "Write the trained model for other programs, with proof.",
    "model": "Make, convert or inspect a model folder.",
}


REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO)
"""Errors of the system that no program can mend: no right to it, a read-only or a failing disk."""


class VerbGroup(TyperGroup):
    """Lists verbs from the table above and imports one when it is called."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """For listing: the verb's name and line only."""
        return TyperCommand(cmd_name, help=VERBS[cmd_name]) if cmd_name in VERBS else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """For calling: the verb itself."""
        name, _, rest = super().resolve_command(ctx, args)
        if name is None:
            return name, None, rest
        command = typer.main.get_command(import_module(f"llamaweft.cli.{name}").app)
        command.name = name
        return name, command, rest


app = typer.Typer(
    cls=VerbGroup,
    help="Fine-tune Llama 3 8B, and every model of the Llama architecture, on your own data.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # a usage error is a sentence, not a box that cuts words
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version."
    ),
) -> None:
    pass


def main() -> None:
    """Entry point of the `llamaweft` command."""
    try:
        typer.main.get_command(app)(prog_name="llamaweft")
    except UserError as error:
        _fail(error, 2)
    except RunError as error:
        _fail(error, 1)
    except BrokenPipeError:  # `llamaweft ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        where = getattr(error, "filename", None)
        if disk_is_full(error):
            _fail(f"the disk is full ({where or 'no space left'}); free some and --resume", 1)
        if isinstance(error, OSError) and error.errno in REFUSED:
            _fail(f"{where or 'a file'}: {error.strerror}", 1)
        _tell_of_bug()


def _tell_of_bug() -> NoReturn:
    """The traceback of what should not have happened, without secrets."""
    print(printable(redacted(traceback.format_exc())), file=sys.stderr)
    sys.exit(1)


def _fail(error: object, code: int) -> None:
    for line in str(error).splitlines():
        print(f"error: {printable(redacted(line))}", file=sys.stderr)
    sys.exit(code)
