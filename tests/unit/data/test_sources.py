"""Readers: every kind of file, and every way in which one is broken."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llamaweft.data.sources import read_path
from llamaweft.errors import UserError

ROWS = [{"prompt": "a, b", "completion": "c\nd"}, {"prompt": "é", "completion": "f"}]


def write(path: Path) -> Path:
    match path.suffix:
        case ".jsonl":
            path.write_text("".join(json.dumps(r) + "\n\n" for r in ROWS), encoding="utf-8")
        case ".json":
            path.write_text(json.dumps(ROWS), encoding="utf-8-sig")
        case ".csv":
            path.write_text('prompt,completion\n"a, b","c\nd"\né,f\n', encoding="utf-8")
        case ".tsv":
            path.write_text('prompt\tcompletion\na, b\t"c\nd"\né\tf\n', encoding="utf-8")
        case ".parquet":
            pq.write_table(pa.Table.from_pylist(ROWS), path)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_every_kind_gives_the_same_rows(suffix: str, tmp_path: Path) -> None:
    assert [row.content for row in read_path(str(write(tmp_path / f"rows{suffix}")))] == ROWS


def test_rows_know_their_line(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl")
    assert [row.where for row in read_path(str(path))] == [f"{path} line 1", f"{path} line 3"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n', ["a.jsonl line 2", "not valid JSON"]),
        ("a.jsonl", b'{"a": 1}\n[1]\n', ["a.jsonl line 2", "holds a list"]),
        ("a.jsonl", b"\n\n", ["no rows"]),
        ("a.jsonl", b'{"a": "\xff"}\n', ["not UTF-8"]),
        ("a.jsonl", b"[" * 100_000, ["line 1", "not valid JSON"]),
        ("a.json", b'{"a": 1}', ["one JSON object", "list of rows"]),
        ("a.json", b'[{"a": 1},\n{"b"]', ["line 2", "not valid JSON"]),
        ("a.json", b"[]", ["no rows"]),
        ("a.csv", b"a,b\n1,2\n3\n", ["a.csv line 3", "2 columns"]),
        ("a.csv", b"a,b\n1,2,3\n", ["a.csv line 2", "2 columns"]),
        ("a.csv", b'a,b\n"1,2\n', ["a.csv line 2", "not closed"]),
        ("a.parquet", b"PAR1 cut short", ["not a readable Parquet"]),
        ("a.xlsx", b"", ["end in .jsonl"]),
    ],
)
def test_a_broken_file_is_named(
    name: str, content: bytes, words: list[str], tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_path(str(tmp_path / name))
    for word in words:
        assert word in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no file .*gone\.jsonl"):
        read_path(str(tmp_path / "gone.jsonl"))
