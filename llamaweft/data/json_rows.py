"""Rows of JSON: one object a line, or one list of objects."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, NoReturn

from llamaweft.data.content import File
from llamaweft.data.rows import (
    MAX_ROW_BYTES,
    NOT_UTF8,
    NUL,
    BadRows,
    Row,
    RowError,
    lines_of,
    too_long,
    unfit,
)
from llamaweft.errors import UserError

_SPACE = " \t\r\n"


def _constant(name: str) -> NoReturn:
    raise RowError(f"is not valid JSON ({name} is no JSON number); mend or remove it")


_decode = json.JSONDecoder(parse_constant=_constant).raw_decode

# What may be an escaped NUL or a surrogate without its other half: a search that costs little and
# misses none, and sometimes finds what `unfit` then finds to be sound, as after two backslashes.
_ESCAPES = (
    r"\\u(?:0000"
    r"|[dD][89abAB]..(?!\\u[dD][c-fC-F])"
    r"|[dD][c-fC-F]..(?<!(?<!\\)\\u[dD][89abAB]..\\u[dD]...))"
)
_SUSPECT_BYTES = re.compile(_ESCAPES.encode(), re.DOTALL)
_SUSPECT = re.compile(_ESCAPES, re.DOTALL)


def read_jsonl(file: File, bad: BadRows) -> Iterator[Row]:
    name, decode = file.name, _decode
    for first, whole, lines in lines_of(file, bad):
        if whole.isspace():
            continue
        # Searched once for all of them: line by line it would cost a tenth of the reading.
        suspect = _SUSPECT_BYTES.search(whole) is not None
        for number, line in enumerate(lines, first):
            try:
                text = line.decode()
                content, end = decode(text)
                plain = not suspect and (end == len(text) or text[end:].isspace())
            except (ValueError, RecursionError, RowError):
                plain = False
            if plain and type(content) is dict:
                yield Row(name, "line", number, content)
            elif line.strip():
                try:
                    yield Row(name, "line", number, _of_line(line))
                except RowError as broken:
                    bad.found(f"{name} line {number} {broken}")


def _of_line(line: bytes) -> dict[str, Any]:
    """The row of a line that is anything but plain. Raises RowError."""
    try:
        text = line.decode().strip(_SPACE)
    except UnicodeDecodeError:
        raise RowError(NOT_UTF8) from None
    try:
        content, end = _decode(text)
    except (ValueError, RecursionError) as error:
        raise RowError(_reason(error, text)) from None
    if end != len(text):
        raise RowError("is not valid JSON (there is more after its end); mend or remove it")
    return _checked(content, text)


def _checked(content: Any, text: str) -> dict[str, Any]:
    """The content of a row that was decoded from `text`. Raises RowError."""
    if not isinstance(content, dict):
        raise RowError(f"holds a {_kind(content)}; a row is an object with named fields")
    if _SUSPECT.search(text) and (reason := unfit(content)):
        raise RowError(reason)
    return content


def _reason(error: Exception, text: str) -> str:
    """What is wrong with JSON text that could not be decoded."""
    if "\0" in text:
        return NUL
    said = "nested too deeply" if isinstance(error, RecursionError) else error
    return f"is not valid JSON ({getattr(said, 'msg', said)}); mend or remove it"


def _kind(content: Any) -> str:
    kinds = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    return kinds.get(type(content), "number")


def read_json(file: File, bad: BadRows) -> Iterator[Row]:
    """One list of objects, of which only the one that is being read is in memory."""
    text = _Text(file.blocks())
    opening = text.peek()
    if not opening:
        return
    if opening != "[":
        kind = {"{": "object", '"': "string"}.get(opening, "value")
        raise UserError(
            f"{file.name} holds one JSON {kind}; a list of rows is needed, or one row a line in a "
            "file that ends in .jsonl"
        )
    number, mark = 0, ","
    text.at += 1
    if text.peek() == "]":
        mark = text.take()
    while mark == ",":
        number += 1
        text.peek()
        line, where = text.line, f"{file.name} row {number}"
        try:
            yield Row(file.name, "row", number, _checked(*text.value()))
        except _JsonError as invalid:
            bad.found(f"{file.name} line {line + invalid.line} {invalid}")
            text.pass_over()
        except RowError as broken:
            bad.found(f"{where} {broken}")
        text.peek()
        mark = text.take()
    if mark != "]" or text.peek():
        raise UserError(
            f"{file.name} line {text.line} is not valid JSON (a list of rows has , between them "
            "and ends with ]); mend it, or fetch it anew if it was cut short"
        )


class _JsonError(RowError):
    """JSON that cannot be decoded; `line`: which line after the start of the row, from 0."""

    def __init__(self, reason: str, line: int) -> None:
        super().__init__(reason)
        self.line = line


class _Text:
    """JSON text as far as it was read and not yet used: `at` is where the next value begins."""

    # Decoding stops at the border of what was read, or a few characters before in an escape.
    BORDER = 16
    MARKS = re.compile(r'\\.|["{}\[\],]', re.DOTALL)
    SPACES = re.compile(r"[ \t\r\n]*")

    def __init__(self, blocks: Iterator[bytes]) -> None:
        # Bytes that are not UTF-8 become halves of surrogate pairs: no text, so they are told.
        self.decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self.blocks = blocks
        self.text, self.at, self.ended = "", 0, False
        self.lines_before = 0

    @property
    def line(self) -> int:
        return 1 + self.lines_before + self.text.count("\n", 0, self.at)

    def more(self) -> bool:
        """Read as much again as there is, so that a long row is not decoded over and over."""
        self.lines_before += self.text.count("\n", 0, self.at)
        pieces = [self.text[self.at :]]
        self.at, wanted = 0, len(pieces[0])
        while not self.ended and wanted >= 0:
            block = next(self.blocks, None)
            self.ended = block is None
            pieces.append(self.decoder.decode(block or b"", final=self.ended))
            wanted -= len(block or b"")
        self.text = "".join(pieces)
        return len(self.text) > len(pieces[0])

    def peek(self) -> str:
        """The next character that is no space, or nothing at the end."""
        while True:
            match = self.SPACES.match(self.text, self.at)
            self.at = match.end() if match else self.at
            if self.at < len(self.text) or not self.more():
                return self.text[self.at : self.at + 1]

    def take(self) -> str:
        self.at += 1
        return self.text[self.at - 1 : self.at]

    def value(self) -> tuple[Any, str]:
        """The next value and its text. Raises _JsonError, and RowError for one that is not fit."""
        while True:
            content, end, error = None, 0, None
            try:
                content, end = _decode(self.text, self.at)
            except RowError as constant:
                raise _JsonError(str(constant), 0) from None
            except (ValueError, RecursionError) as found:
                error = found
            whole = error is None and (end < len(self.text) or self.ended)
            if whole or self._is_final(error):
                break
            if len(self.text) - self.at > MAX_ROW_BYTES:
                raise _JsonError(too_long(), 0)
            self.more()
        if error is not None:
            place = getattr(error, "pos", self.at)
            lines = self.text.count("\n", self.at, place)
            raise _JsonError(_reason(error, self.text[self.at : place + 1]), lines)
        start, self.at = self.at, end
        text = self.text[start:end]
        if len(text) > MAX_ROW_BYTES:
            raise RowError(too_long())
        try:
            text.encode()
        except UnicodeEncodeError:
            raise RowError(NOT_UTF8) from None
        return content, text

    def _is_final(self, error: Exception | None) -> bool:
        """Whether more text would not change that the value cannot be decoded."""
        if error is None or self.ended:
            return self.ended
        if not isinstance(error, json.JSONDecodeError):
            return True
        unfinished = error.msg.startswith("Unterminated string")
        return not unfinished and error.pos < len(self.text) - self.BORDER

    def pass_over(self) -> None:
        """Go to the mark after a value that cannot be decoded, by its quotes and brackets."""
        depth, quoted = 0, False
        while True:
            used = self.at
            for match in self.MARKS.finditer(self.text, self.at):
                mark, used = match[0], match.end()
                if mark == '"':
                    quoted = not quoted
                elif quoted or mark[0] == "\\":
                    continue
                elif mark in "[{":
                    depth += 1
                elif depth == 0:
                    self.at = match.start()
                    return
                elif mark in "]}":
                    depth -= 1
            open_escape = self.text.endswith("\\") and used < len(self.text)
            self.at = len(self.text) - open_escape
            if not self.more():
                return
