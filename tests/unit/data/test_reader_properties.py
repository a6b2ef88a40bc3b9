"""Properties of the readers: what is written is read, and what is broken ends in one sentence."""

from __future__ import annotations

import csv
import io
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamaweft.data import content, json_rows, readers, rows, table_rows
from llamaweft.data.content import File
from llamaweft.data.rows import BadRows, unfit
from llamaweft.errors import UserError

NO_TEXT = "\0\ud800\udbff\udc00\udfff"
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
ANY_TEXT = st.text(st.one_of(st.characters(), st.sampled_from("\\u d83e" + NO_TEXT)))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
OBJECTS = st.lists(st.dictionaries(TEXT, VALUES, max_size=4), min_size=1, max_size=6)
BLOCKS = st.sampled_from([1, 2, 3, 7, 64, 2**16])


@pytest.fixture(autouse=True, scope="module")
def limits() -> Iterator[None]:
    """Small ones, so that what crosses a border of blocks or a limit is common."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (rows, json_rows, table_rows, readers):
            patch.setattr(module, "MAX_ROW_BYTES", 4000)
        yield


def read(name: str, data: bytes, block: int, policy: str = "error") -> tuple[list[Any], BadRows]:
    bad = BadRows(policy)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(content, "BLOCK_BYTES", block)
        path = Path(folder) / name
        path.write_bytes(data)
        found = [row.content for row in readers.read(File(name, path), bad)]
    return found, bad


@settings(deadline=None)
@given(OBJECTS, BLOCKS, st.booleans(), st.sampled_from(["\n", "\r\n", "\n\n"]))
def test_json_lines_are_read_as_they_were_written(
    objects: list[dict], block: int, ascii_only: bool, newline: str
) -> None:
    lines = [json.dumps(row, ensure_ascii=ascii_only) + newline for row in objects]
    assert read("a.jsonl", "".join(lines).encode(), block)[0] == objects


@settings(deadline=None)
@given(OBJECTS, BLOCKS, st.booleans(), st.sampled_from([None, 0, 2]))
def test_a_json_list_is_read_as_it_was_written(
    objects: list[dict], block: int, ascii_only: bool, indent: int | None
) -> None:
    text = json.dumps(objects, ensure_ascii=ascii_only, indent=indent)
    assert read("a.json", text.encode(), block)[0] == objects


@settings(deadline=None)
@given(st.data(), BLOCKS, st.sampled_from([",", "\t"]), st.sampled_from(["\n", "\r\n"]))
def test_tables_of_text_are_read_as_they_were_written(
    data: st.DataObject, block: int, delimiter: str, newline: str
) -> None:
    columns = data.draw(st.lists(TEXT.filter(str.strip), min_size=1, max_size=4, unique=True))
    fields = st.lists(TEXT, min_size=len(columns), max_size=len(columns))
    table = data.draw(st.lists(fields, min_size=1, max_size=5))
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter, lineterminator=newline, quoting=csv.QUOTE_ALL)
    writer.writerows([columns, *table])
    found, _ = read("a.tsv" if delimiter == "\t" else "a.csv", text.getvalue().encode(), block)
    assert found == [dict(zip(columns, values, strict=True)) for values in table]


@settings(deadline=None, max_examples=300)
@given(ANY_TEXT, st.booleans(), BLOCKS, st.sampled_from(["a.jsonl", "a.json"]))
def test_a_row_is_refused_exactly_when_it_holds_no_text(
    text: str, as_key: bool, block: int, name: str
) -> None:
    row = {text: 1} if as_key else {"a": [text]}
    line = json.dumps(row)
    expected = unfit(json.loads(line))
    assert (expected is not None) == ("\0" in text or not _is_text(json.loads(json.dumps(text))))
    line = f"[{line}]" if name == "a.json" else line
    found, bad = read(name, line.encode(), block, "skip")
    assert (found, bad.count) == (([], 1) if expected else ([json.loads(json.dumps(row))], 0))


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


BASES = {
    "a.jsonl": b'{"a": "x, y", "b": [1, {"c": null}]}\n{"a": "\\ud83d\\ude00", "b": 2.5e3}\n',
    "a.json": b'[{"a": "x, y", "b": [1, {"c": null}]},\n {"a": "\\ud83d\\ude00", "b": 2.5e3}]\n',
    "a.csv": b'a,b\n"x, ""y""\nz",1\n\xc3\xa9,2\n,\n',
    "a.tsv": b'a\tb\n"x\ty"\t1\n\xc3\xa9\t2\n',
    "a.txt": b"x\r\n\xc3\xa9\n",
}
EDITS = st.lists(
    st.tuples(
        st.integers(0, 200),
        st.integers(0, 3),
        st.sampled_from([b'"', b"\n", b",", b"\\", b"[", b"}", b"\0", b"\xff", b"\\ud800", b"NaN"])
        | st.binary(max_size=3),
    ),
    min_size=1,
    max_size=4,
)


@settings(deadline=None, max_examples=500)
@given(st.sampled_from(sorted(BASES)), EDITS, BLOCKS)
def test_a_damaged_file_ends_in_rows_or_in_one_sentence(
    name: str, edits: list[tuple[int, int, bytes]], block: int
) -> None:
    data = BASES[name]
    for place, removed, added in edits:
        data = data[:place] + added + data[place + removed :]
    with one_sentence(name) as raised:
        found, _ = read(name, data, block)
    with one_sentence(name) as raised_always:
        kept, bad = read(name, data, block, "skip")
        assert all(isinstance(row, dict) and unfit(row) is None for row in kept)
        assert len(bad.examples) == min(bad.count, 5)
        assert bool(bad.count) == bool(raised)
        assert raised or kept == found
    assert raised or not raised_always


@contextmanager
def one_sentence(name: str) -> Iterator[list[str]]:
    """What was said, if a UserError was raised: one line that names the file."""
    said: list[str] = []
    try:
        yield said
    except UserError as error:
        said.append(str(error))
        assert said[0].startswith(name)
        assert len(said[0].splitlines()) == 1


@settings(deadline=None, max_examples=200)
@given(st.lists(st.sampled_from([b'"', b",", b"x", b"\n", b'""', b"y" * 900]), max_size=40), BLOCKS)
def test_the_quotes_of_a_table_never_hide_rows_from_the_count(
    pieces: list[bytes], block: int
) -> None:
    data = b"a,b\n" + b"".join(pieces) + b"\n1,2\n"
    with one_sentence("a.csv"):
        found, bad = read("a.csv", data, block, "skip")
        plain = [row for row in csv.reader(io.StringIO(data.decode(), newline=""))][1:]
        if bad.count == 0:
            assert [list(row.values()) for row in found] == [row for row in plain if row]
