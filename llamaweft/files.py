"""Files that are complete or absent: written aside, flushed to the disk, renamed; and checksums
of those that others go by."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import xxhash

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
        flush(aside)
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


def take_place(aside: Path, target: Path) -> None:
    """Rename a folder that was written aside and flushed to `target`. One of that name is there
    until then; `put_back` brings it back where a kill came between."""
    put_back(target)
    old = _old(target)
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    try:
        aside.rename(target)
    except OSError:
        put_back(target)
        raise
    _fsync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def put_back(target: Path) -> None:
    """Undo a `take_place` that was cut short when the old folder was gone and the new one not yet
    there."""
    if _old(target).exists() and not target.exists():
        _old(target).rename(target)


def _old(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def remove(folder: Path) -> None:
    """Delete a folder that is, until it is gone, no longer taken for one: renamed first."""
    gone = folder.with_name(f".{folder.name}.gone")
    shutil.rmtree(gone, ignore_errors=True)
    folder.rename(gone)
    shutil.rmtree(gone)


def flush(folder: Path) -> None:
    """Onto the disk, so that the folder's new name never stands for missing bytes."""
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o644)  # safetensors lets only the owner read
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --- checksums ----------------------------------------------------------------------------------

CHECKSUMS = "checksums.json"
"""Holds, for files beside it and in folders beside it, their XXH3 (128 bits). Against bits that
flip, not against an enemy."""


def digests(path: Path, name: str | None = None) -> dict[str, list[str]]:
    """The checksum of a file, or of each file below a folder, by its name in CHECKSUMS.
    name: that `path` will have."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    within = [file.relative_to(path).as_posix() for file in files]
    names = [(name or path.name) + ("" if place == "." else f"/{place}") for place in within]
    return {key: [digest(file)] for key, file in zip(names, files, strict=True)}


def digest(path: Path) -> str:
    """XXH3 (128 bits) of a file."""
    state = xxhash.xxh3_128()
    with path.open("rb") as file:
        while part := file.read(2**24):
            state.update(part)
    return str(state.hexdigest())


@contextmanager
def recorded(target: Path, sums: dict[str, list[str]]) -> Iterator[None]:
    """Record the checksums of what takes the place of `target` in the block. Wherever that is cut
    short, those of what is there are recorded."""
    known = read_checksums(target.parent)
    both = {name: [*known.get(name, []), *new] for name, new in sums.items()}
    _write_checksums(target.parent, known | both)
    yield
    inside = f"{target.name}/"
    others = {n: s for n, s in known.items() if n != target.name and not n.startswith(inside)}
    _write_checksums(target.parent, others | sums)


def write_recorded(path: Path, text: str) -> None:
    """`write_text`, and record the checksum."""
    aside = path.with_name(f".{path.name}.new")
    write_text(aside, text)
    with recorded(path, digests(aside, path.name)):
        aside.replace(path)


def record(*paths: Path) -> None:
    """Record the checksums of files, or folders, as they are now; all are in one folder."""
    root = paths[0].parent
    known = read_checksums(root)
    for path in paths:
        known |= digests(path)
    _write_checksums(root, known)


def forget(path: Path) -> None:
    """Drop the checksum of a file that will change."""
    known = read_checksums(path.parent)
    if known.pop(path.name, None) is not None:
        _write_checksums(path.parent, known)


def check_recorded(*paths: Path) -> None:
    """Raises UserError where a file, or one below a folder, has not the checksum that is recorded
    of it; where none is recorded, nothing is said."""
    for path in paths:
        known = read_checksums(path.parent)
        inside = [n for n in known if n == path.name or n.startswith(f"{path.name}/")]
        for name in inside:
            file = path.parent / name
            if file.is_file() and digest(file) not in known[name]:
                raise UserError(
                    f"{file} is damaged: it has not the checksum that "
                    f"{path.parent / CHECKSUMS} has of it; take it from a copy, or, where you "
                    "changed it yourself, remove its line there"
                )


def read_checksums(root: Path) -> dict[str, list[str]]:
    """What is recorded of the files in a folder. Raises UserError where it cannot be read."""
    path = root / CHECKSUMS
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it to go on without it") from None
    try:
        content = json.loads(text)
    except ValueError:
        content = None
    if not isinstance(content, dict) or not all(
        isinstance(sums, list) and all(isinstance(one, str) for one in sums)
        for sums in content.values()
    ):
        raise UserError(f"{path} is damaged; delete it to go on without it")
    return content


def _write_checksums(root: Path, sums: dict[str, list[str]]) -> None:
    write_text(root / CHECKSUMS, json.dumps(sums, indent=2) + "\n")


# --- the disk -----------------------------------------------------------------------------------


def disk_is_full(error: BaseException) -> bool:
    """Whether it says that; libraries written in Rust have errors of their own for it."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return "os error 28" in str(error) or "No space left on device" in str(error)


def need_disk(folder: Path, needed_bytes: int, what: str) -> None:
    """Raises UserError when the disk of `folder` has not that much room."""
    existing = next(p for p in [folder, *folder.absolute().parents] if p.exists())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise UserError(
            f"the disk of {folder} has {free / 2**20:.0f} MiB free, {what} needs "
            f"{needed_bytes / 2**20:.0f} MiB; free some or give another folder"
        )
