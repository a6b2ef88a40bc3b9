"""Where rows are: from what a recipe names to files on this machine.

A place is a file, a folder, a glob, `builtin:smart-home/SPLIT`, or an address.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import xxhash

from llamaweft.data.content import File, is_readable, known_endings, need_ending, unreadable
from llamaweft.data.downloads import remote_files, web_file
from llamaweft.errors import UserError
from llamaweft.shown import without_secret

BUILTIN = "builtin:smart-home/"

_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_MAGIC = re.compile(r"[*?\[]")


def files(path: str | list[str]) -> list[File]:
    """The files of one place or of several, in their order; those of a folder or a glob sorted.

    A folder is searched through, without names that begin with a dot; only files with a known
    ending count, and two names of one file give its rows once. Raises UserError for what is not
    there, is no ordinary file, is of no known kind, or leads out of its folder by a symbolic link.
    """
    places = [path] if isinstance(path, str) else path
    found = [file for place in places for file in _files_of(place)]
    if not found:
        raise UserError("a source names no file; give its path")
    return found


def _files_of(place: str) -> list[File]:
    if place.startswith(BUILTIN):
        from llamaweft.data import smart_home  # imports torch, which no other file needs

        return [File(place, smart_home.path(place.removeprefix(BUILTIN)))]
    match = _ADDRESS.match(place)
    scheme = match[1].lower() if match else "file"
    if scheme != "file":
        try:
            without_secret(place)
        except ValueError as error:
            raise UserError(str(error)) from None
    if scheme in ("http", "https"):
        return [web_file(place)]
    if scheme != "file":
        return remote_files(place)
    place = place.removeprefix("file://")
    try:
        return _local_files(place)
    except (OSError, ValueError, RuntimeError) as error:  # such as no permission, a NUL in a name
        raise unreadable(place, error) from None


def _local_files(place: str) -> list[File]:
    path = Path(place)
    if not place or not path.exists():
        if _MAGIC.search(place):
            return _matching(place)
        raise UserError(f"there is no file {place!r}; check the path in the recipe")
    if path.is_dir():
        return _below(place, path, ("**",))
    need_ending(str(path), path.name)
    _need_file(path)
    return [File(str(path), path)]


def _matching(place: str) -> list[File]:
    parts = Path(place).parts
    fixed = next(i for i, part in enumerate(parts) if _MAGIC.search(part))
    folder = Path(*parts[:fixed])
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}, of {place}; check the path in the recipe")
    return _below(place, folder, parts[fixed:])


def _below(place: str, folder: Path, pattern: tuple[str, ...]) -> list[File]:
    """The readable files in `folder` whose path within it fits `pattern`."""
    root = folder.resolve()
    found: dict[Path, File] = {}
    for path in sorted(_walk(folder, root, len(pattern) - 1 if "**" not in pattern else None)):
        if is_readable(path.name) and _fits(path.relative_to(folder).parts, pattern):
            target = _within(path, root) if path.is_symlink() else path.resolve()
            _need_file(path)
            found.setdefault(target, File(str(path), path))
    if not found:
        raise UserError(f"{place} names no file that ends in {known_endings()}; check the path")
    return list(found.values())


def _walk(folder: Path, root: Path, levels: int | None) -> Iterator[Path]:
    """Every file in `folder`, at most `levels` folders down. A link to a folder within is not
    followed, since its files are found where they lie; so a loop ends."""
    for place, folders, names in os.walk(folder, onerror=_refuse):
        here = Path(place)
        if levels is not None and len(here.relative_to(folder).parts) >= levels:
            folders.clear()
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in folders:
            if (here / name).is_symlink():
                _within(here / name, root)
        yield from (here / name for name in names if not name.startswith("."))


def _refuse(error: OSError) -> None:
    raise unreadable(str(error.filename), error)


def _within(link: Path, root: Path) -> Path:
    try:
        target = link.resolve(strict=True)
    except (OSError, RuntimeError):
        raise UserError(f"the symbolic link {link} leads nowhere; mend or remove it") from None
    if not target.is_relative_to(root):
        raise UserError(
            f"the symbolic link {link} leads out of its folder, to {target}; name that file itself "
            "in the recipe, or remove the link"
        )
    return target


def _fits(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Whether a path fits a glob, part by part; `**` is any number of parts."""
    if not pattern:
        return not parts
    head, rest = pattern[0], pattern[1:]
    if head == "**":
        if rest[:1] == ("**",):
            return _fits(parts, rest)
        return any(_fits(parts[skipped:], rest) for skipped in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], head) and _fits(parts[1:], rest)


def _need_file(path: Path) -> None:
    if not path.is_file():  # asked before it is opened, since a FIFO would wait for a writer
        raise UserError(f"{path} is no ordinary file; write its content to one")


def fingerprint_of(found: Iterable[File]) -> str:
    """A hash of the names and the bytes of files. Raises UserError where one cannot be read."""
    digest = xxhash.xxh3_128()
    for file in found:
        content = xxhash.xxh3_128()
        try:
            with file.path.open("rb") as opened:
                while block := opened.read(2**20):
                    content.update(block)
        except OSError as error:
            raise unreadable(file.name, error) from None
        digest.update(json.dumps([file.name, content.hexdigest()]).encode())
    return digest.hexdigest()
