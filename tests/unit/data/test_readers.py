"""Readers: every kind of file gives the same rows, and every way to be broken has its sentence."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llamaweft.data import content, json_rows, readers, rows, table_rows
from llamaweft.data.content import TABLE_ENDINGS, TEXT_ENDINGS, File
from llamaweft.data.rows import BadRows, Row
from llamaweft.errors import UserError

ROWS = [{"prompt": "a, b", "completion": "c\nd"}, {"prompt": "é 😀", "completion": "f"}]
GOOD = b'{"a": 1}\n'


def read(path: Path, policy: str = "error") -> tuple[list[Row], BadRows]:
    bad = BadRows(policy)
    return list(readers.read(File(path.name, path), bad)), bad


def packed(content: bytes, packing: str) -> bytes:
    if packing == ".gz":
        return gzip.compress(content)
    if packing == ".zst":
        return pa.compress(content, "zstd", asbytes=True)
    return content


def encoded(kind: str) -> bytes:
    """ROWS as a file of this kind."""
    table, sink = pa.Table.from_pylist(ROWS), io.BytesIO()
    match kind:
        case ".jsonl" | ".ndjson":
            return "".join(json.dumps(row) + "\n\n" for row in ROWS).encode()
        case ".json":
            return json.dumps(ROWS, indent=1, ensure_ascii=False).encode()
        case ".csv":
            return 'prompt,completion\n"a, b","c\nd"\n\né 😀,f\n'.encode()
        case ".tsv":
            return 'prompt\tcompletion\na, b\t"c\nd"\né 😀\tf\n'.encode()
        case ".parquet":
            pq.write_table(table, sink)
        case ".arrow":
            with pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)
        case "stream":
            with pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)
    return sink.getvalue()


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", [".jsonl", ".ndjson", ".json", ".csv", ".tsv"])
def test_every_kind_of_text_gives_the_same_rows(kind: str, packing: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows{kind}{packing}"
    path.write_bytes(packed(encoded(kind), packing))
    assert [row.content for row in read(path)[0]] == ROWS


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".tsv"])
def test_a_byte_order_mark_and_crlf_are_nothing_special(kind: str, tmp_path: Path) -> None:
    plain = [{"prompt": "é", "completion": "f"}]
    text = {
        ".jsonl": '{"prompt": "é", "completion": "f"}\r\n\r\n',
        ".json": '[\r\n{"prompt": "é",\r\n "completion": "f"}\r\n]\r\n',
        ".csv": "prompt,completion\r\né,f\r\n",
        ".tsv": "prompt\tcompletion\r\né\tf\r\n",
    }[kind]
    path = tmp_path / f"rows{kind}"
    path.write_bytes(text.encode("utf-8-sig"))
    assert [row.content for row in read(path)[0]] == plain


@pytest.mark.parametrize("kind", [".parquet", ".arrow", "stream"])
def test_every_kind_of_table_gives_the_same_rows(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows{'.arrow' if kind == 'stream' else kind}"
    path.write_bytes(encoded(kind))
    found = read(path)[0]
    assert [row.content for row in found] == ROWS
    assert [row.where for row in found] == [f"{path.name} row 1", f"{path.name} row 2"]


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.txt.gz", "a.md.zst"])
def test_a_text_is_one_row(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(packed("\ufeff# é\r\n\r\nb,\n".encode(), path.suffix))
    assert read(path)[0] == [Row(name, "line", 1, {"text": "# é\n\nb,\n"})]


def test_every_ending_that_is_known_has_a_reader() -> None:
    assert set(readers.READERS) == {*TEXT_ENDINGS, *TABLE_ENDINGS}


def test_rows_know_their_line(tmp_path: Path) -> None:
    for kind, places in {
        ".jsonl": ["line 1", "line 3"],
        ".json": ["row 1", "row 2"],
        ".csv": ["line 2", "line 5"],
        ".tsv": ["line 2", "line 4"],
    }.items():
        path = tmp_path / f"rows{kind}"
        path.write_bytes(encoded(kind))
        assert [row.where for row in read(path)[0]] == [f"rows{kind} {place}" for place in places]


@pytest.mark.parametrize(
    ("name", "content", "words", "kept"),
    [
        ("a.jsonl", GOOD + b'{"a": \n{"a": 2}', ["line 2", "not valid JSON", "Expecting value"], [1, 2]),
        ("a.jsonl", GOOD + b"{oops\n" + GOOD, ["line 2", "not valid JSON"], [1, 1]),
        ("a.jsonl", GOOD + b'{"a": 2} {}\n' + GOOD, ["line 2", "more after its end"], [1, 1]),
        ("a.jsonl", GOOD + b"[1]\n" + GOOD, ["line 2", "holds a list"], [1, 1]),
        ("a.jsonl", GOOD + b"null\n3\n", ["line 2", "holds a null"], [1]),
        ("a.jsonl", GOOD + b'{"a": "\xff"}\n' + GOOD, ["line 2", "not UTF-8"], [1, 1]),
        ("a.jsonl", GOOD + b'{"a": "\xed\xa0\x80"}\n' + GOOD, ["line 2", "not UTF-8"], [1, 1]),
        ("a.jsonl", GOOD + b'{"a": "\0"}\n' + GOOD, ["line 2", "NUL"], [1, 1]),
        ("a.jsonl", GOOD + b'{"a": [{"b": "\\u0000"}]}\n' + GOOD, ["line 2", "NUL"], [1, 1]),
        ("a.jsonl", GOOD + b'{"\\u0000": 1}\n' + GOOD, ["line 2", "NUL"], [1, 1]),
        ("a.jsonl", GOOD + b'{"a": "\\ud800"}\n' + GOOD, ["line 2", "surrogate"], [1, 1]),
        ("a.jsonl", GOOD + b'{"a": "\\uDC01"}\n' + GOOD, ["line 2", "surrogate"], [1, 1]),
        ("a.jsonl", GOOD + b'{"a": "\\\\ud83d\\ude00"}\n' + GOOD, ["line 2", "surrogate"], [1, 1]),
        ("a.jsonl", GOOD + b"[" * 100_000 + b"\n" + GOOD, ["line 2", "nested too deeply"], [1, 1]),
        ("a.jsonl", GOOD + b'{"a": NaN}\n' + GOOD, ["line 2", "NaN"], [1, 1]),
        ("a.jsonl", GOOD + b'{"a": [-Infinity]}\n' + GOOD, ["line 2", "-Infinity"], [1, 1]),
        ("a.jsonl", GOOD + b'{"a": ' + b"9" * 5000 + b"}\n" + GOOD, ["line 2", "not valid JSON"], [1, 1]),
        ("a.json", b'[{"a": 1},\n3,\n{"a": 2}]', ["row 2", "holds a number"], [1, 2]),
        ("a.json", b'[{"a": 1},\n\n{"a": x,\n "b": [","]},\n{"a": 2}]', ["line 3", "not valid JSON"], [1, 2]),
        ("a.json", b'[{"a": 1},\n{"b": 1,\n "a": x},{"a": 2}]', ["line 3", "not valid JSON"], [1, 2]),
        ("a.json", b'[{"a": 1},{"a": "\\q,]\\""},{"a": 2}]', ["line 1", "Invalid \\escape"], [1, 2]),
        ("a.json", b'[{"a": 1},{"a": NaN},{"a": 2}]', ["line 1", "NaN"], [1, 2]),
        ("a.json", b'[{"a": 1},{"a": "\xff"},{"a": 2}]', ["row 2", "not UTF-8"], [1, 2]),
        ("a.json", b'[{"a": 1},{"a": "\0"},{"a": 2}]', ["line 1", "NUL"], [1, 2]),
        ("a.json", b'[{"a": 1},{"a": "\\u0000"},{"a": 2}]', ["row 2", "NUL"], [1, 2]),
        ("a.json", b'[{"a": 1},{"a": "\\ud800"},{"a": 2}]', ["row 2", "surrogate"], [1, 2]),
        ("a.json", b'[{"a": 1},' + b"[" * 9999 + b"]" * 9999 + b"]", ["line 1", "nested too deeply"], [1]),
        ("a.csv", b"a,b\n1,2\n3\n4,5\n", ["line 3", "2 columns"], ["1", "4"]),
        ("a.csv", b"a,b\n1,2\n3,4,5\n4,5\n", ["line 3", "2 columns"], ["1", "4"]),
        ("a.csv", b'a,b\n1,2\n"x\ny",4,5\n4,5\n', ["line 3", "2 columns"], ["1", "4"]),
        ("a.csv", b'a,b\n1,2\n"3,4\n4,5\n', ["line 3", "quote that is not closed"], ["1", "4"]),
        ("a.csv", b'a,b\n1,2\n"3"x,4\n4,5\n', ["line 3", "cannot be read"], ["1", "4"]),
        ("a.csv", b"a,b\n1,2\n\xff,4\n4,5\n", ["line 3", "not UTF-8"], ["1", "4"]),
        ("a.csv", b'a,b\n1,2\n"x\n\xff\ny",4\n4,5\n', ["line 3", "not UTF-8"], ["1", "4"]),
        ("a.csv", b"a,b\n1,2\n3,\0\n4,5\n", ["line 3", "NUL"], ["1", "4"]),
        ("a.tsv", b"a\tb\n1\t2\n3\n4\t5\n", ["line 3", "2 columns"], ["1", "4"]),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_read_is_named_or_passed_over(
    name: str, content: bytes, words: list[str], kept: list, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read(path)
    for word in [name, *words]:
        assert word in str(caught.value)
    found, bad = read(path, "skip")
    assert [row.content["a"] for row in found] == kept
    assert bad.examples[0] == str(caught.value)
    assert bad.count >= 1


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b"\n \r\n\n", ["no rows"]),
        ("a.json", b"[]", ["no rows"]),
        ("a.json", b" \n", ["no rows"]),
        ("a.csv", b"a,b\n", ["no rows"]),
        ("a.txt", b" \n", ["no rows"]),
        ("a.json", b'{"a": 1}', ["one JSON object", "list of rows", ".jsonl"]),
        ("a.json", b"3", ["one JSON value", "list of rows"]),
        ("a.json", b'[{"a": 1},\n{"b": 2}', ["line 2", "not valid JSON"]),
        ("a.json", b'[{"a": 1},\n{"b": "', ["line 2", "not valid JSON"]),
        ("a.json", b'[{"a": 1},\n', ["line 2", "not valid JSON"]),
        ("a.json", b'[{"a": 1}]\n[]', ["line 2", "not valid JSON"]),
        ("a.json", b'[{"a": 1}\n{"a": 1}]', ["line 2", "not valid JSON"]),
        ("a.csv", b"a,b,a\n1,2,3\n", ["line 1", "'a' twice"]),
        ("a.csv", b'"a,b\n1,2\n', ["line 1", "not closed"]),
        ("a.csv", b"a,\xff\n1,2\n", ["line 1", "not UTF-8"]),
        ("a.parquet", b"PAR1 cut short", ["not a readable Parquet"]),
        ("a.parquet", encoded(".parquet")[:-20], ["not a readable Parquet"]),
        ("a.parquet", b"", ["not a readable Parquet"]),
        ("a.arrow", encoded(".arrow")[:-20], ["not a readable Arrow"]),
        ("a.arrow", encoded("stream")[:-40], ["not a readable Arrow"]),
        ("a.arrow", b"", ["not a readable Arrow"]),
        ("a.jsonl.gz", b"hello", ["not a gzip file"]),
        ("a.jsonl.gz", gzip.compress(GOOD * 99, mtime=0)[:-9], ["cut short"]),
        ("a.jsonl.gz", gzip.compress(GOOD, mtime=0)[:-8] + bytes(8), ["not a gzip file"]),
        ("a.csv.zst", b"hello", ["not a zstd file"]),
        ("a.jsonl.zst", packed(GOOD * 99, ".zst")[:-2], ["cut short"]),
        ("a.jsonl", gzip.compress(GOOD, mtime=0), ["packed", ".gz"]),
        ("a.jsonl", packed(GOOD, ".zst"), ["packed", ".zst"]),
        ("a.jsonl", GOOD.decode().encode("utf-16"), ["UTF-16"]),
        ("a.csv", "a,b\n1,2\n".encode("utf-16-be"), ["UTF-16"]),
        ("a.csv", "a,b\n1,2\n".encode("utf-16-le"), ["UTF-16"]),
        ("a.txt", "ab".encode("utf-32"), ["UTF-16 or UTF-32"]),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read_is_an_error_always(
    name: str, content: bytes, words: list[str], tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    for policy in ("error", "skip"):
        with pytest.raises(UserError) as caught:
            read(path, policy)
    for word in [name, *words]:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("a.txt", b"a\n\xff", "line 2 is not UTF-8"),
        ("a.md", b"a\n\n\0", "line 3 holds a NUL"),
        ("a.txt", b"a" * 5000, "is longer than"),
    ],
)
def test_a_text_that_cannot_be_used_is_a_bad_row(
    name: str, content: bytes, place: str, tmp_path: Path, short_rows: None
) -> None:
    (tmp_path / name).write_bytes(content)
    found, bad = read(tmp_path / name, "skip")
    assert found == []
    assert f"{name} {place}" in bad.examples[0]


@pytest.fixture
def short_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of at most 1000 bytes, read in blocks of 64."""
    for module in (rows, json_rows, table_rows, readers):
        monkeypatch.setattr(module, "MAX_ROW_BYTES", 1000)
    monkeypatch.setattr(content, "BLOCK_BYTES", 64)


LONG = b"x" * 1500


# The third and fourth list: a row that decodes and is too long, a number that lies across blocks.
@pytest.mark.parametrize(
    ("name", "content", "place", "kept"),
    [
        ("a.jsonl", b'{"a": "' + LONG + b'"}\n{"a": 2}\n', "line 1", [2]),
        ("a.jsonl", b'{"a": 1}\n{"a": "' + LONG + b'"}\n\n{"a": 2}\n', "line 2", [1, 2]),
        ("a.jsonl", b'{"a": 1}\n{"a": "' + LONG, "line 2", [1]),
        ("a.json", b'[{"a": 1},\n{"a": "[' + LONG + b'\\"]"},\n{"a": 2}]', "line 2", [1, 2]),
        ("a.json", b'[{"a": 1},\n{"a": [' + b"1," * 900 + b'3]},\n{"a": 2}]', "line 2", [1, 2]),
        ("a.json", b'[{"a": 1},\n{"a": "' + b"x" * 995 + b'"},\n{"a": 2}]', "row 2", [1, 2]),
        ("a.json", b"[" + b"12" * 100 + b',\n{"a": 2}]', "row 1", [2]),
        ("a.csv", b'a,b\n1,1\n"3\n' + b"2,2\n" * 400 + b'x",1\n', "line 3", ["1"] + ["2"] * 400 + ['x"']),
        ("a.csv", b'a\n1\n"' + LONG + b'"\n2\n', "line 3", ["1", "2"]),
        ("a.csv", b'a,b\n1,1\n"3,\n' + b"2,2\n" * 400, "line 3", ["1"] + ["2"] * 400),
    ],
)  # fmt: skip
def test_a_row_that_is_too_long_is_passed_over(
    name: str, content: bytes, place: str, kept: list, tmp_path: Path, short_rows: None
) -> None:
    (tmp_path / name).write_bytes(content)
    found, bad = read(tmp_path / name, "skip")
    assert [row.content["a"] for row in found] == kept
    assert bad.count == 1
    assert f"{name} {place} " in bad.examples[0]


@pytest.mark.parametrize("piece", [b'"' + b'\\"]' * 50 + b'"', b'"\\\\", ' * 50])
@pytest.mark.parametrize("block", range(1, 12))
def test_an_escape_that_lies_across_blocks_is_one(
    block: int, piece: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(content, "BLOCK_BYTES", block)
    (tmp_path / "a.json").write_bytes(b'[{"a": x, "b": ' + piece + b'},\n{"a": 2}]')
    found, bad = read(tmp_path / "a.json", "skip")
    assert ([row.content for row in found], bad.count) == ([{"a": 2}], 1)


def test_lines_after_a_row_that_is_too_long_keep_their_number(
    tmp_path: Path, short_rows: None
) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD + LONG + b"\n" + GOOD + b"\n" + GOOD)
    assert [row.number for row in read(tmp_path / "a.jsonl", "skip")[0]] == [1, 3, 5]


def test_a_line_that_was_passed_over_is_no_part_of_a_field(
    tmp_path: Path, short_rows: None
) -> None:
    (tmp_path / "a.csv").write_bytes(b'a,b\n"x\n' + LONG + b'\ny",1\n2,3\n')
    found, bad = read(tmp_path / "a.csv", "skip")
    assert [row.content for row in found if row.content["a"] not in ('y"', "2")] == []
    assert bad.count == 2


def test_a_row_of_a_parquet_file_that_is_too_long_is_passed_over(
    tmp_path: Path, short_rows: None
) -> None:
    pq.write_table(pa.table({"a": [["x" * 600, "y" * 600], ["z"]]}), tmp_path / "a.parquet")
    found, bad = read(tmp_path / "a.parquet", "skip")
    assert [row.number for row in found] == [2]
    assert "row 1 is longer than" in bad.examples[0]


def test_a_field_may_be_longer_than_pythons_own_limit(tmp_path: Path) -> None:
    csv.field_size_limit(131_072)
    (tmp_path / "a.csv").write_bytes(b"a\n" + b"x" * 200_000 + b"\n")
    assert len(read(tmp_path / "a.csv")[0][0].content["a"]) == 200_000


def test_rows_of_a_parquet_file_that_are_no_text_are_named(tmp_path: Path) -> None:
    damaged = pa.array(["a", "\0", "c", "d"])
    offsets = pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0")
    broken = pa.StringArray.from_buffers(2, offsets, pa.py_buffer(b"\xffe"))
    pq.write_table(pa.table({"a": pa.chunked_array([damaged, broken])}), tmp_path / "a.parquet")
    found, bad = read(tmp_path / "a.parquet", "skip")
    assert [(row.number, row.content["a"]) for row in found] == [
        (1, "a"), (3, "c"), (4, "d"), (6, "e"),
    ]  # fmt: skip
    assert [sentence.split(";")[0] for sentence in bad.examples] == [
        "a.parquet row 2 holds a NUL byte, which no tokenizer reads as text",
        "a.parquet row 5 is not UTF-8 text",
    ]


def test_an_arrow_file_whose_offsets_lead_out_of_it_is_refused(tmp_path: Path) -> None:
    batch = pa.record_batch({"a": ["x" * 77]})
    with pa.ipc.new_file(tmp_path / "a.arrow", batch.schema) as writer:
        writer.write_batch(batch)
    offsets, beyond = b"\0\0\0\0\x4d\0\0\0", b"\0\0\0\0\0\0\0\x10"
    content = (tmp_path / "a.arrow").read_bytes()
    place = content.rindex(offsets, 0, content.index(b"x" * 77))
    (tmp_path / "a.arrow").write_bytes(content[:place] + beyond + content[place + 8 :])
    with pytest.raises(UserError, match=r"a\.arrow is not a readable Arrow file"):
        read(tmp_path / "a.arrow", "skip")


def test_a_table_with_a_column_twice_is_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match="'a' twice"):
        read(tmp_path / "a.parquet")


@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_a_bomb_is_refused(packing: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.jsonl{packing}"
    path.write_bytes(packed((b" " * 999 + b"\n") * 70_000, packing))
    with pytest.raises(UserError, match="unpacks to more than 250 times its size"):
        read(path, "skip")


def test_a_file_that_was_packed_well_is_no_bomb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(content, "BOMB_BYTES", 1000)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(GOOD * 1000))
    assert len(read(tmp_path / "a.jsonl.gz")[0]) == 1000


def test_a_row_of_50_mb_is_never_held(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"a": "' + b"x" * 50_000_000 + b'"}\n' + GOOD)
    tracemalloc.start()
    found, bad = read(tmp_path / "a.jsonl", "skip")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert ([row.content for row in found], bad.count) == ([{"a": 1}], 1)
    assert "line 1 is longer than 16 MiB" in bad.examples[0]
    assert peak < 2.5 * rows.MAX_ROW_BYTES


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".parquet", ".arrow"])
def test_a_file_is_read_in_less_memory_than_it_has_bytes(kind: str, tmp_path: Path) -> None:
    words = "words that make a row of some length " * 5
    plenty = [{"a": f"{number} {words}"} for number in range(60_000)]
    path = tmp_path / f"a{kind}"
    match kind:
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in plenty))
        case ".json":
            path.write_text(json.dumps(plenty))
        case ".csv":
            path.write_text("a\n" + "".join(row["a"] + "\n" for row in plenty))
        case ".parquet":
            pq.write_table(pa.Table.from_pylist(plenty), path, compression="none")
        case ".arrow":
            table = pa.Table.from_pylist(plenty)
            with pa.ipc.new_file(path, table.schema) as writer:
                writer.write_table(table)
    del plenty
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    most = count = 0
    for row in readers.read(File("a", path), BadRows()):
        count += 1
        if row.number % 1000 == 0:
            most = max(most, pa.total_allocated_bytes() - before)
    most += tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 60_000
    assert path.stat().st_size > 11_000_000
    assert most < 5_000_000
