"""What a row is, what becomes of one that cannot be read, and the lines that rows are read from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from llamaweft.data.content import File
from llamaweft.errors import UserError

MAX_ROW_BYTES = 16 * 2**20
EXAMPLES_KEPT = 5

NOT_UTF8 = "is not UTF-8 text; convert or remove it"
NUL = "holds a NUL byte, which no tokenizer reads as text; remove it"
LONE = "holds half of a surrogate pair (as \\ud83d alone), which is no character; mend or remove it"


class Row(NamedTuple):
    """One row as it was read, and where: `unit` (line or row) `number`, from 1, of `name`.

    A tuple, since one is made for every row: a frozen dataclass takes twice as long.
    """

    name: str
    unit: str
    number: int
    content: dict[str, Any]

    @property
    def where(self) -> str:
        return f"{self.name} {self.unit} {self.number}"


class BadRows:
    """What happens to a row that cannot be read.

    policy: error raises UserError, skip counts. `examples`: the first sentences.
    """

    def __init__(self, policy: str = "error") -> None:
        self.policy = policy
        self.count = 0
        self.examples: list[str] = []

    def found(self, sentence: str) -> None:
        if self.policy != "skip":
            raise UserError(sentence)
        self.count += 1
        if self.count <= EXAMPLES_KEPT:
            self.examples.append(sentence)


class RowError(Exception):
    """Its text says what is wrong with a row, without its place."""


def unfit(content: Any) -> str | None:
    """Why a row with this content cannot be used, or None: a NUL, half a surrogate pair, or more
    text than a row may have. Whatever is nested is looked into."""
    size, waiting = 0, [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            size += len(value)
            if "\0" in value:
                return NUL
            if not value.isascii():
                try:
                    value.encode()
                except UnicodeEncodeError:
                    return LONE
        elif isinstance(value, dict):
            waiting += value.keys()
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
    return too_long() if size > MAX_ROW_BYTES else None


def too_long() -> str:
    return f"is longer than {MAX_ROW_BYTES // 2**20} MiB; split or remove it"


def lines_of(file: File, bad: BadRows) -> Iterator[tuple[int, bytes, list[bytes]]]:
    """Whole lines that were read together: the number of the first, as one, and one by one. A line
    that is longer than MAX_ROW_BYTES is passed over without being held."""
    number, start, passing_over = 1, bytearray(), False
    for block in file.blocks():
        head, newline, tail = block.rpartition(b"\n")
        going_on = (head if newline else tail).partition(b"\n")[0]
        if not passing_over and len(start) + len(going_on) > MAX_ROW_BYTES:
            bad.found(f"{file.name} line {number} {too_long()}")
            passing_over = True
            start.clear()
        if not newline:
            start += b"" if passing_over else tail
            continue
        if passing_over:
            number += 1
            _, more, head = head.partition(b"\n")
        if not passing_over or more:
            whole = bytes(start) + head
            lines = whole.split(b"\n")
            yield number, whole, lines
            number += len(lines)
        start, passing_over = bytearray(tail), False
    if start:
        yield number, bytes(start), [bytes(start)]
