"""Rows from files and hubs, each with the place it came from."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamaweft.data import smart_home
from llamaweft.errors import UserError

BUILTIN = "builtin:smart-home/"


@dataclass(frozen=True)
class Row:
    """One row as it was read. `where`: file and line, to name it to a person."""

    where: str
    content: dict[str, Any]


def read_path(path: str) -> list[Row]:
    """The rows of one file, told apart by its ending; `builtin:smart-home/SPLIT` is the demo's.

    Raises UserError for a missing or empty file, an unknown ending and an unreadable row.
    """
    file = smart_home.path(path.removeprefix(BUILTIN)) if path.startswith(BUILTIN) else Path(path)
    name = path if path.startswith(BUILTIN) else str(file)
    reader = _READERS.get(file.suffix.lower())
    if reader is None:
        known = " ".join(_READERS)
        raise UserError(f"{name}: rows are read from files that end in {known}; rename or convert")
    if not file.is_file():
        raise UserError(f"there is no file {name}; check the path in the recipe")
    try:
        rows = [Row(where, _as_mapping(where, content)) for where, content in reader(file, name)]
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name} is not UTF-8 text (byte {error.start} cannot be read); convert it first"
        ) from None
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror or error}") from None
    if not rows:
        raise UserError(f"{name} holds no rows; give a file with at least one")
    return rows


def read_hub(name: str, config: str | None, split: str, revision: str | None) -> list[Row]:
    """The rows of a hub data set, through the `datasets` library. Never runs its code.

    Raises UserError when it cannot be fetched.
    """
    import datasets  # slow to import, and only hubs need it

    try:
        table = datasets.load_dataset(name, config, split=split, revision=revision)
    except Exception as error:  # the library raises its own kinds for each way to fail
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"the hub data set {name} (split {split}) cannot be fetched: {reason}"
        ) from None
    return [Row(f"{name} row {i + 1}", dict(content)) for i, content in enumerate(table)]


def _read_jsonl(file: Path, name: str) -> Iterator[tuple[str, Any]]:
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{name} line {number}"
            try:
                yield where, json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                reason = getattr(error, "msg", "nested too deeply")
                raise UserError(
                    f"{where} is not valid JSON ({reason}); mend or remove it"
                ) from None


def _read_json(file: Path, name: str) -> Iterator[tuple[str, Any]]:
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(f"{name} line {error.lineno} is not valid JSON ({error.msg})") from None
    except RecursionError:
        raise UserError(f"{name} is not valid JSON (nested too deeply)") from None
    if not isinstance(content, list):
        raise UserError(f"{name} holds one JSON {_kind(content)}; a list of rows is needed")
    for number, row in enumerate(content, start=1):
        yield f"{name} row {number}", row


def _read_table(file: Path, name: str, delimiter: str) -> Iterator[tuple[str, Any]]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
        try:
            for row in reader:
                where = f"{name} line {reader.line_num}"
                if None in row or None in row.values():
                    columns = len(reader.fieldnames or [])
                    raise UserError(
                        f"{where} does not have {columns} columns like the first line; mend it"
                    )
                yield where, row
        except csv.Error as error:
            reason = "a quote is not closed" if "unexpected end" in str(error) else str(error)
            raise UserError(f"{name} line {reader.line_num + 1} cannot be read: {reason}") from None


def _read_csv(file: Path, name: str) -> Iterator[tuple[str, Any]]:
    return _read_table(file, name, ",")


def _read_tsv(file: Path, name: str) -> Iterator[tuple[str, Any]]:
    return _read_table(file, name, "\t")


def _read_parquet(file: Path, name: str) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        number = 0
        with pq.ParquetFile(file) as table:
            for batch in table.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{name} row {number}", row
    except pa.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{name} is not a readable Parquet file: {reason}") from None


_READERS: dict[str, Callable[[Path, str], Iterator[tuple[str, Any]]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}


def _as_mapping(where: str, content: Any) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise UserError(f"{where} holds a {_kind(content)}; a row is an object with named fields")
    return content


def _kind(content: Any) -> str:
    kinds = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    return kinds.get(type(content), "number")
