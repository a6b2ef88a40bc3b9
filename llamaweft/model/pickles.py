"""Weights that torch pickled (`.pth`, `.bin`), read without ever running what a pickle says.

A pickle is a program. torch's restricted reader (`weights_only=True`) builds tensors and plain
containers and refuses every other call; what it gives is accepted here only if it is a mapping of
names to tensors. Nothing is copied: the tensors are pages of the file.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llamaweft.errors import UserError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What weights are read from."""

PICKLE_BYTES = 64 * 2**20
"""The longest pickle that is read. It names the tensors and holds no numbers: that of Llama 3 70B
has less than a MiB."""

INSTEAD = "give the model as safetensors"


def mapped_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors in a file of `torch.save`, by name, mapped from the disk.

    Raises UserError for a file that is missing, cut short or of torch's form before 1.6, that holds
    anything but names and plain tensors in fp32, bf16 or fp16, or that asks for code to be run.
    """
    _check_archive(path)
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # a pickle can go wrong in as many ways as a program
        raise UserError(f"{path} {_reason(error)}; {INSTEAD}") from None
    if not isinstance(content, dict):
        raise UserError(
            f"{path} holds {type(content).__name__} and not names with tensors; {INSTEAD}"
        )
    for name, tensor in content.items():
        if (problem := _problem(name, tensor)) is not None:
            raise UserError(f"{path} {problem}; {INSTEAD}")
    return dict(content)


def common_dtype(tensors: Collection[Tensor]) -> torch.dtype:
    """That of all of them, or fp32, which holds every number of the others."""
    kinds = {tensor.dtype for tensor in tensors}
    return kinds.pop() if len(kinds) == 1 else torch.float32


def _check_archive(path: Path) -> None:
    """Raises UserError for what is no archive as torch writes it: nothing in it is packed, and the
    pickle is short."""
    try:
        with path.open("rb") as file:
            begin = file.read(2)
    except FileNotFoundError:
        raise UserError(f"{path} is missing; download the model again") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
        if begin == b"PK":
            raise UserError(
                f"{path} is cut short or damaged ({error}); download it again"
            ) from None
        raise UserError(
            f"{path} is no archive of torch.save as torch 1.6 and later write it; {INSTEAD}"
        ) from None
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED:
            raise UserError(
                f"{path} holds {member.filename} packed, as torch never does; {INSTEAD}"
            )
        if member.filename.endswith(".pkl") and member.file_size > PICKLE_BYTES:
            raise UserError(
                f"{path} holds a pickle of {member.file_size / 2**20:.0f} MiB, and one of weights "
                f"has at most {PICKLE_BYTES // 2**20}; {INSTEAD}"
            )


def _reason(error: Exception) -> str:
    """Why torch did not read a file, without its advice to trust the file."""
    said = str(error)
    if (asked := re.search(r"nsupported (?:global: )?GLOBAL ([\w.]+)", said)) is not None:
        return f"asks for {asked[1]} to be called, and code inside a file is never run"
    if isinstance(error, RuntimeError | EOFError) and "weights_only" not in said:
        first = (said.splitlines() or [type(error).__name__])[0]
        return f"is cut short or damaged ({first[:200]})"
    return "holds something else than names and tensors"


def _problem(name: Any, tensor: Any) -> str | None:
    """What keeps an entry from being a name and a plain tensor whose bytes stand in the file."""
    if not isinstance(name, str):
        return f"holds the name {str(name)[:80]!r}, which is no text"
    if not name.isprintable():
        return f"holds the name {name[:80]!r}, which cannot be shown"
    if type(tensor) not in (Tensor, nn.Parameter):
        return f"holds {type(tensor).__name__} under {name[:80]!r} and no tensor"
    if tensor.device.type != "cpu" or tensor.layout != torch.strided or tensor.is_quantized:
        return f"holds {name[:80]!r} as no plain tensor"
    if tensor.dtype not in DTYPES:
        plain = ", ".join(map(str, DTYPES))
        return f"holds {name[:80]!r} in {tensor.dtype}, and weights are read from {plain}"
    if not tensor.is_contiguous():  # such a one can pretend to any size
        return f"holds {name[:80]!r} as a view of other numbers"
    return None
