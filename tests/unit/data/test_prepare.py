"""Preparing: cached by content, resumable, cleaned with counts, equal however it is cut up."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from llamaweft.data import build
from llamaweft.data.chat import Document, Encoder
from llamaweft.data.example import Example
from llamaweft.data.prepare import Preparation, Prepared
from llamaweft.data.selection import fitted
from llamaweft.data.sources import PlainSource
from llamaweft.data.store import StoredRows, Writer
from llamaweft.errors import UserError


def chat(question: str, answer: str) -> dict:
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


ROWS = [chat(f"question {i} " * (1 + i % 5), f"answer {i} " * (1 + i % 7)) for i in range(50)]


@pytest.fixture
def rows(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("LLAMAWEFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "CHUNK", 4)
    monkeypatch.setattr(build, "CHUNKS_A_COMMIT", 1)
    return write(tmp_path / "rows.jsonl", ROWS)


def write(path: Path, content: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    return path


def preparation(tokenizer, **options) -> Preparation:
    settings = {"task": "chat", "train_on": "assistant", "max_length_tokens": 500, "seed": 0}
    return Preparation(tokenizer, **settings | {"on_too_long": None} | options)


def prepare(tokenizer, *paths: Path, fraction: float | None = None, **options) -> Prepared:
    train = [(PlainSource(str(path)), 1.0 + i) for i, path in enumerate(paths)]
    return preparation(tokenizer, **options).prepare(train, None, fraction)


def content(prepared: Prepared) -> list[tuple]:
    return [(d.where, d.ids.tolist(), d.weights.tolist()) for d in prepared.documents]


def test_stored_rows_are_what_was_read(tokenizer, rows) -> None:
    found = prepare(tokenizer, rows)
    examples = preparation(tokenizer).read(PlainSource(str(rows)))
    expected = Encoder(tokenizer)(examples)
    assert content(found) == [(d.where, d.ids.tolist(), d.weights.tolist()) for d in expected]
    assert [e.messages for e in found.examples] == [e.messages for e in examples]
    assert found.documents.labels_N.tolist() == [d.trained_tokens for d in expected]
    assert found.audit.tokens == sum(len(d.ids) for d in expected)


def test_a_second_time_reads_what_was_prepared(tokenizer, rows, monkeypatch) -> None:
    first = content(prepare(tokenizer, rows))
    monkeypatch.delattr(build.Build, "_write")
    assert content(prepare(tokenizer, rows)) == first


@pytest.mark.parametrize(
    "name", ["rows.bin", "ids.bin", "weights.bin", "records.bin", "state.json"]
)
def test_rows_with_a_flipped_bit_are_prepared_again(tokenizer, rows, tmp_path, name) -> None:
    first = content(prepare(tokenizer, rows))
    (path,) = (tmp_path / "cache").rglob(name)
    sound = path.read_bytes()
    path.write_bytes(bytes([*sound[:-9], sound[-9] ^ 2, *sound[-8:]]))
    said: list[str] = []
    assert content(prepare(tokenizer, rows, say=said.append)) == first
    assert path.read_bytes() == sound
    assert any(name in line for line in said) == (name != "state.json")


@pytest.mark.parametrize("change", ["rows", "train_on", "clean"])
def test_what_decides_the_rows_prepares_anew(tokenizer, rows, change) -> None:
    first = content(prepare(tokenizer, rows))
    if change == "rows":
        write(rows, [chat("another", "one"), *ROWS[1:]])
        assert content(prepare(tokenizer, rows)) != first
    elif change == "train_on":
        assert content(prepare(tokenizer, rows, train_on="all")) != first
    else:
        step = {"step": "length", "min_characters": 40, "max_characters": None}
        assert len(content(prepare(tokenizer, rows, clean=[step]))) < len(first)


class StoppedError(Exception):
    pass


def stop_at(rows: int):
    def report(count: int) -> None:
        if count >= rows:
            raise StoppedError

    return report


@pytest.mark.parametrize("stop_after", [1, 3, 9])
def test_preparing_goes_on_where_it_was_stopped(tokenizer, rows, tmp_path, stop_after) -> None:
    other = write(tmp_path / "other.jsonl", [chat(f"q{i}", f"a{i}") for i in range(9)])
    steps = [{"step": "regex", "drop": "answer 7", "keep": None}]
    whole = prepare(tokenizer, rows, other, clean=steps)
    (folder,) = [f for f in (tmp_path / "cache" / "prepared").iterdir() if f.is_dir()]
    expected = {p.name: p.read_bytes() for p in folder.glob("*.bin")}
    for path in folder.iterdir():
        path.unlink()

    with pytest.raises(StoppedError):
        prepare(tokenizer, rows, other, clean=steps, report=stop_at(4 * stop_after))
    committed = Writer(folder)
    assert 0 <= committed.rows < len(whole.examples)
    committed.close()
    seen: list[int] = []
    again = prepare(tokenizer, rows, other, clean=steps, report=seen.append)
    assert content(again) == content(whole)
    assert {p.name: p.read_bytes() for p in folder.glob("*.bin")} == expected
    assert again.audit.cleaning == whole.audit.cleaning
    assert seen[0] > committed.rows  # what was prepared is not prepared again


def test_going_on_the_shape_of_the_rows_before_is_known(tokenizer, rows) -> None:
    rows.write_text(rows.read_text() + json.dumps({"prompt": "q", "completion": "a"}) + "\n")
    with pytest.raises(StoppedError):
        prepare(tokenizer, rows, report=stop_at(20))
    with pytest.raises(UserError, match=r"line 1 of the shape messages, .*line 51 of the shape"):
        prepare(tokenizer, rows)


def test_a_mistake_leaves_nothing_in_the_cache(tokenizer, rows, tmp_path) -> None:
    with rows.open("a", encoding="utf-8") as file:
        file.write("{oops\n")
    with pytest.raises(UserError, match=r"rows\.jsonl line 51"):
        prepare(tokenizer, rows)
    assert not [f for f in (tmp_path / "cache" / "prepared").iterdir() if f.is_dir()]
    found = prepare(tokenizer, rows, on_bad_row="skip").audit
    finding = next(f for f in found.findings if f.check == "unreadable_rows")
    assert (finding.count, finding.status, found.rows) == (1, "warning", 50)
    assert "line 51" in finding.examples[0]


def test_files_of_a_source_and_compressed_ones_read_alike(tokenizer, rows, tmp_path) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    write(folder / "a.jsonl", ROWS[:20])
    packed = gzip.compress("".join(json.dumps(r) + "\n" for r in ROWS[20:]).encode())
    (folder / "b.jsonl.gz").write_bytes(packed)
    found, expected = prepare(tokenizer, folder), prepare(tokenizer, rows)
    assert [c[1:] for c in content(found)] == [c[1:] for c in content(expected)]


def test_weights_follow_their_source(tokenizer, rows, tmp_path) -> None:
    other = write(tmp_path / "other.jsonl", [chat("q", "a"), chat("r", "b")])
    found = prepare(tokenizer, rows, other)
    assert found.weights.tolist() == [1.0] * 50 + [2.0] * 2


def test_a_share_is_held_out_and_only_that(tokenizer, rows) -> None:
    found = prepare(tokenizer, rows, fraction=0.2)
    inside = {e.key for e in found.validation}
    assert len(found.validation) == len(found.validation_documents) == 10
    assert len(found.documents) == 40
    assert not inside & {e.key for e in found.examples}
    again = prepare(tokenizer, rows, fraction=0.2)
    assert {e.key for e in again.validation} == inside
    assert {e.key for e in prepare(tokenizer, rows, fraction=0.2, seed=1).validation} != inside


def test_cleaning_counts_what_it_removes(tokenizer, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("LLAMAWEFT_CACHE", str(tmp_path / "cache"))
    words = " ".join(f"word{i}" for i in range(60))
    held = chat("held out?", f"{words} held")
    content_rows = [
        chat("a question", "cafe\u0301"),
        chat("twice", "said"),
        chat("twice", "said"),
        chat("an empty answer", "  "),
        chat("near", words),
        chat("near", words + " more"),
        chat("Held out", f"{words.upper()} HELD!"),
    ]
    clean = [
        {"step": "normalize", "form": "NFC"},
        {"step": "empty", "min_characters": 1},
        {"step": "duplicates"},
        {"step": "near_duplicates", "threshold": 0.8},
        {"step": "leakage", "against": str(write(tmp_path / "bench.jsonl", [held])), "ngram": 13},
    ]
    rows = write(tmp_path / "rows.jsonl", content_rows)
    found = prepare(tokenizer, rows, clean=clean[:4])
    removed = {step["step"]: (step["count"], step["changed"]) for step in found.audit.cleaning}
    assert removed == {
        "normalize": (0, 1),
        "empty": (1, 0),
        "duplicates": (1, 0),
        "near_duplicates": (2, 0),
    }
    assert found.examples[0].messages[1]["content"] == "caf\u00e9"
    assert len(found.examples) == 3
    without_near = prepare(tokenizer, rows, clean=clean[:3] + clean[4:])
    step = without_near.audit.cleaning[-1]
    assert step["step"] == "leakage"
    assert f"{rows} line 7" in step["examples"]
    assert "twice" in without_near.examples[1].messages[0]["content"]


@pytest.mark.parametrize(
    ("policy", "lengths"), [("split", [20, 20, 3]), ("truncate", [20]), ("drop", [])]
)
def test_long_rows_are_cut_as_the_recipe_says(tokenizer, tmp_path, policy, lengths) -> None:
    stored = StoredRows(_store(tmp_path / "store", tokens=43))
    found = fitted(stored, np.array([0]), 20, policy)
    assert [len(d.ids) for d in found] == found.lengths.tolist() == lengths
    assert found.labels_N.tolist() == [d.trained_tokens for d in found]


def _store(folder: Path, tokens: int) -> Path:
    writer = Writer(folder)
    document = Document(np.arange(tokens, dtype=np.int32), np.ones(tokens, np.float32), "f")
    writer.append([Example("f", text="x")], [document], [0], 0)
    writer.commit(complete=True)
    writer.close()
    return folder


def test_weights_of_messages_come_back_from_the_disk(tokenizer, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("LLAMAWEFT_CACHE", str(tmp_path / "cache"))
    row = chat("q", "a")
    row["messages"][1]["weight"] = 0.25
    found = prepare(tokenizer, write(tmp_path / "rows.jsonl", [row, chat("r", "b")]))
    assert set(found.documents[0].weights.tolist()) == {0.0, 0.25}
    assert set(found.documents[1].weights.tolist()) == {0.0, 1.0}
