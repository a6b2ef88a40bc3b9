"""Rows of tables: CSV and TSV, Parquet, Arrow."""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

from llamaweft.data.content import File
from llamaweft.data.rows import (
    LONE,
    MAX_ROW_BYTES,
    NOT_UTF8,
    BadRows,
    Row,
    RowError,
    lines_of,
    unfit,
)
from llamaweft.errors import UserError

TABLE_ROWS = 128
"""Rows of a binary table that are in memory as Python objects at once."""


class _Record:
    """The lines of a table of text, for csv.reader to take as many as a record has."""

    def __init__(self, lines: Iterator[tuple[int, str]]) -> None:
        self.lines = lines
        self.again: deque[tuple[int, str]] = deque()
        self.held: list[tuple[int, str]] = []
        self.size = 0

    def __iter__(self) -> _Record:
        return self

    def __next__(self) -> str:
        number, line = self.again.popleft() if self.again else next(self.lines)
        self.size += len(line)
        passed_over = bool(self.held) and number != self.held[-1][0] + 1
        if passed_over or (self.held and self.size > MAX_ROW_BYTES):
            self.again.appendleft((number, line))
            raise RowError("has a quote that is not closed; mend or remove it")
        self.held.append((number, line))
        return line

    @property
    def number(self) -> int:
        """The line on which the record begins."""
        return self.held[0][0] if self.held else 1

    def end(self) -> None:
        self.held, self.size = [], 0

    def give_back(self) -> None:
        """After a quote that is not closed, which takes in the rows that follow: all lines but the
        first are read again."""
        self.again.extendleft(reversed(self.held[1:]))
        self.end()


def _read_table(file: File, bad: BadRows, delimiter: str) -> Iterator[Row]:
    # Python's limit is the whole process's, and lower than what a row may have: only ever raised.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW_BYTES))
    record = _Record(
        (number, line.decode(errors="surrogateescape") + "\n")
        for first, _, lines in lines_of(file, bad)
        for number, line in enumerate(lines, first)
    )
    reader = csv.reader(record, delimiter=delimiter, strict=True)
    columns: list[str] = []
    while True:
        try:
            values = next(reader)
        except StopIteration:
            return
        except (csv.Error, RowError) as error:
            _found(file, record, _of_csv(error), bad if columns else BadRows())
            record.give_back()
            continue
        reason = _unfit_values(values, columns)
        if reason:
            _found(file, record, reason, bad if columns else BadRows())
        elif not columns:
            columns = values
        elif values:
            content = dict(zip(columns, values, strict=True))
            yield Row(file.name, "line", record.number, content)
        record.end()


def _found(file: File, record: _Record, reason: str, bad: BadRows) -> None:
    bad.found(f"{file.name} line {record.number} {reason}")


def _of_csv(error: Exception) -> str:
    if isinstance(error, RowError):
        return str(error)
    if "unexpected end" in str(error):
        return "has a quote that is not closed; mend or remove it"
    return f"cannot be read ({error}); mend or remove it"


def _unfit_values(values: list[str], columns: list[str]) -> str | None:
    if (reason := unfit("".join(values))) is not None:
        return NOT_UTF8 if reason == LONE else reason
    if not columns and (twice := _twice(values)) is not None:
        return f"names the column {twice!r} twice; rename one of them"
    if columns and values and len(values) != len(columns):
        return f"does not have {len(columns)} columns like the first line; mend or remove it"
    return None


def read_csv(file: File, bad: BadRows) -> Iterator[Row]:
    return _read_table(file, bad, ",")


def read_tsv(file: File, bad: BadRows) -> Iterator[Row]:
    return _read_table(file, bad, "\t")


def read_parquet(file: File, bad: BadRows) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # Buffered, so that a column chunk is not read as a whole.
        with pq.ParquetFile(file.path, buffer_size=2**20, pre_buffer=False) as table:
            batches = table.iter_batches(TABLE_ROWS, use_threads=False)
            yield from _rows_of(file, bad, table.schema_arrow.names, batches)
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise _damaged(file, "Parquet", error) from None


def read_arrow(file: File, bad: BadRows) -> Iterator[Row]:
    """Of an Arrow IPC file or stream, mapped into memory."""
    import pyarrow as pa

    try:
        with pa.memory_map(str(file.path)) as source:
            of_file = source.read(6) == b"ARROW1"
            source.seek(0)
            reader = pa.ipc.open_file(source) if of_file else pa.ipc.open_stream(source)
            batches = map(reader.get_batch, range(reader.num_record_batches)) if of_file else reader
            yield from _rows_of(file, bad, reader.schema.names, map(_sound, batches))
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise _damaged(file, "Arrow", error) from None


def _sound(batch: Any) -> Any:
    """The batch, once every offset in it was looked at: one that is wrong would be read from
    memory that is not the file's."""
    batch.validate(full=True)
    return batch


def _damaged(file: File, kind: str, error: BaseException) -> UserError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return UserError(f"{file.name} is not a readable {kind} file: {reason}; fetch or write it anew")


def _rows_of(file: File, bad: BadRows, names: list[str], batches: Iterable[Any]) -> Iterator[Row]:
    if (twice := _twice(names)) is not None:
        raise UserError(f"{file.name} names the column {twice!r} twice; rename one of them")
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, TABLE_ROWS):
            for content in _contents(batch.slice(start, TABLE_ROWS)):
                number += 1
                if isinstance(content, str):
                    bad.found(f"{file.name} row {number} {content}")
                elif (reason := unfit(content)) is not None:
                    bad.found(f"{file.name} row {number} {reason}")
                else:
                    yield Row(file.name, "row", number, content)


def _contents(part: Any) -> Iterable[dict[str, Any] | str]:
    """The rows of a part of a batch; for one that Python cannot hold, what is wrong with it."""
    try:
        return part.to_pylist()
    except (ValueError, OverflowError) as error:
        if part.num_rows > 1:
            return [row for i in range(part.num_rows) for row in _contents(part.slice(i, 1))]
        if isinstance(error, UnicodeDecodeError):
            return [NOT_UTF8]
        return [f"cannot be read ({error}); mend or remove it"]


def _twice(names: list[str]) -> str | None:
    return next((name for i, name in enumerate(names) if name in names[:i]), None)
