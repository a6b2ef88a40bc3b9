"""How bytes become rows: one reader for each kind of file, all in bounded memory.

A row that cannot be read goes to BadRows, which raises or counts; a file that cannot be read at
all is a UserError always.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, islice

from llamaweft.data.content import File
from llamaweft.data.json_rows import read_json, read_jsonl
from llamaweft.data.rows import MAX_ROW_BYTES, NOT_UTF8, NUL, BadRows, Row, too_long
from llamaweft.data.table_rows import read_arrow, read_csv, read_parquet, read_tsv
from llamaweft.errors import UserError


def read(file: File, bad: BadRows) -> Iterator[Row]:
    """The rows of a file, told apart by its ending.

    Raises UserError for a file that cannot be read or has no rows, and what `bad` raises.
    """
    before = bad.count
    rows = READERS[file.ending](file, bad)
    first = list(islice(rows, 1))
    if not first and bad.count == before:
        raise UserError(f"{file.name} holds no rows; give a file with at least one")
    return chain(first, rows)


def _read_text(file: File, bad: BadRows) -> Iterator[Row]:
    """The whole file as one row."""
    content = bytearray()
    for block in file.blocks():
        content += block
        if len(content) > MAX_ROW_BYTES:
            bad.found(f"{file.name} {too_long()}")
            return
    try:
        text = content.decode().replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        bad.found(f"{file.name} line {line} {NOT_UTF8}")
        return
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        bad.found(f"{file.name} line {line} {NUL}")
        return
    if text.strip():
        yield Row(file.name, "line", 1, {"text": text})


READERS: dict[str, Callable[[File, BadRows], Iterator[Row]]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".txt": _read_text,
    ".md": _read_text,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
}
