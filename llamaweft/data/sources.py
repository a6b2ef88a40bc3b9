"""Rows from files, folders, addresses and hubs, one by one, each with the place it came from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

import xxhash

from llamaweft.data import places, readers
from llamaweft.data.rows import BadRows, Row, unfit
from llamaweft.errors import UserError
from llamaweft.shown import redacted

HUB_ROWS = 128
"""Rows of a hub data set that are in memory as Python objects at once."""


class Source(Protocol):
    """Where rows come from, `path` or `hub`; the recipe's rows of `data.train` are such."""

    @property
    def path(self) -> str | list[str] | None: ...
    @property
    def hub(self) -> str | None: ...
    @property
    def config(self) -> str | None: ...
    @property
    def split(self) -> str: ...
    @property
    def revision(self) -> str | None: ...
    @property
    def format(self) -> str: ...
    @property
    def columns(self) -> dict[str, str] | None: ...


@dataclass(frozen=True)
class PlainSource:
    """A source that no recipe describes: a place, its rows of any shape."""

    path: str | list[str] | None = None
    hub: str | None = None
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    format: str = "auto"
    columns: dict[str, str] | None = None


def read_rows(source: Source, bad: BadRows | None = None) -> Iterator[Row]:
    """The rows of a source in the order of its files, in bounded memory.

    `bad`: what happens to a row that cannot be read; left out, it is an error. Raises UserError for
    a place that is not there, a file that cannot be read, and when no row is left.
    """
    bad = BadRows() if bad is None else bad
    name = _name(source)
    rows = _file_rows(source.path, bad) if source.path is not None else _hub_rows(source, bad)
    first = next(rows, None)
    if first is None:
        raise UserError(f"{name} holds no rows that can be read; mend it, or give another source")
    yield first
    yield from rows


def read_path(path: str) -> list[Row]:
    """All rows of one place. Raises UserError for a row that cannot be read, too."""
    return list(_file_rows(path, BadRows()))


def fingerprint(source: Source) -> str:
    """A hash of what a source holds: names and bytes of its files, or the hub's own fingerprint.

    Raises UserError as read_rows does, for places and files.
    """
    if source.path is not None:
        return places.fingerprint_of(places.files(source.path))
    table = _hub_table(source)
    asked = [source.hub, source.config, source.split, source.revision]
    return xxhash.xxh3_128_hexdigest(json.dumps([*asked, table._fingerprint]).encode())


def _name(source: Source) -> str:
    if isinstance(source.path, list):
        return ", ".join(source.path)
    return str(source.path if source.path is not None else source.hub)


def _file_rows(path: str | list[str], bad: BadRows) -> Iterator[Row]:
    return chain.from_iterable(readers.read(file, bad) for file in places.files(path))


def _hub_rows(source: Source, bad: BadRows) -> Iterator[Row]:
    name, number = str(source.hub), 0
    for batch in _hub_table(source).iter(HUB_ROWS):
        for values in zip(*batch.values(), strict=True):
            number += 1
            content = dict(zip(batch, values, strict=True))
            if reason := unfit(content):
                bad.found(f"{name} row {number} {reason}")
            else:
                yield Row(name, "row", number, content)


def _hub_table(source: Source) -> Any:
    """A hub data set, mapped into memory, through the `datasets` library. Never runs its code.

    Raises UserError when it cannot be fetched.
    """
    import datasets  # slow to import, and only hubs need it

    asked = {"split": source.split, "revision": source.revision}
    try:
        return datasets.load_dataset(source.hub, source.config, **asked)
    except Exception as error:  # the library raises its own kinds for each way to fail
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"the hub data set {source.hub} (split {source.split}) cannot be fetched: "
            f"{redacted(reason)}"
        ) from None
