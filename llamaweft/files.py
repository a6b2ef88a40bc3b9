"""Files that are complete or absent: written aside, flushed to the disk, renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llamaweft.errors import UserError

try:
    import fcntl
except ImportError:  # no such locks on this system
    fcntl = None  # type: ignore[assignment]


@contextmanager
def written_aside(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its place, flushed to the disk, when all went
    well; otherwise nothing is left.

    Raises UserError when `folder` is there and not empty, cannot be written, or the disk is full.
    """
    if folder.is_file() or (folder.exists() and any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not empty; give a new folder")
    aside = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        yield aside
        _flush(aside)
        if folder.exists():
            folder.rmdir()
        aside.rename(folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """A file that one process holds at a time, the others waiting; it is let go with its process,
    however that ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_text(path: Path, text: str) -> None:
    """Write a file aside, flush it to the disk and rename it: complete or absent."""
    aside = path.with_name(f".{path.name}.tmp")
    with aside.open("w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    aside.replace(path)


def _flush(folder: Path) -> None:
    """Onto the disk, so that the folder's new name never stands for missing bytes."""
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o644)  # safetensors lets only the owner read
            with path.open("rb") as file:
                os.fsync(file.fileno())


def need_disk(folder: Path, needed_bytes: int, what: str) -> None:
    """Raises UserError when the disk of `folder` has not that much room."""
    existing = next(p for p in [folder, *folder.absolute().parents] if p.exists())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise UserError(
            f"the disk of {folder} has {free / 2**20:.0f} MiB free, {what} needs "
            f"{needed_bytes / 2**20:.0f} MiB; free some or give another folder"
        )
