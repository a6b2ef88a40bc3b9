"""Prepared rows on the disk: written once, chunk by chunk, and read through memory maps.

A row takes 5 bytes a token, its record (what the row says, as JSON) and a line of a table. So
millions of rows need no memory, and a run that was stopped while preparing goes on from its last
chunk.

    rows.bin      a ROW for each row            records.bin   where the row is from, and its key
    ids.bin       int32 token ids               weights.bin   uint8, indices into "weights"
    labels.bin    what a head reads, for tasks that have one (targets.py)
    state.json    how far they go, what is needed to go on, the "weights"; "complete" at the end,
                  with the checksum (XXH3, 128 bits) of each file; its own is that of all else in it
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from llamaweft.data.chat import Document, labels_within
from llamaweft.data.example import Example
from llamaweft.data.targets import LABEL
from llamaweft.errors import UserError
from llamaweft.files import digest, write_text

ROW = np.dtype(
    [
        ("first_token", "<u8"),
        ("first_byte", "<u8"),
        ("first_label", "<u8"),
        ("key", "<u8"),
        ("answer", "<u8"),
        ("tokens", "<u4"),
        ("trained", "<u4"),
        ("second", "<u4"),
        ("flags", "<u4"),
        ("source", "<u4"),
    ]
)
"""first_token, tokens: where its tokens are. first_byte: where its record begins. key: a hash of
what it says. answer: of its trained tokens, or labels. trained: how many these are. second: where
the second text of a pair begins, or 0. flags: what the audit saw (audit.py). source: index."""

FILES = {"rows": ROW, "ids": np.dtype("<i4"), "weights": np.dtype("u1"), "records": np.dtype("u1")}
FILES["labels"] = LABEL


class Writer:
    """Appends rows to a folder. `state` is what the caller needs to go on: it is written with each
    `commit`, and read back when a folder is opened that is not complete."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        found = read_state(folder)
        self.state: dict[str, Any] = found.get("state", {})
        sizes = found.get("bytes", {})
        self.palette: dict[float, int] = {w: i for i, w in enumerate(found.get("weights", [0, 1]))}
        self._files = {}
        for name in FILES:
            path = folder / f"{name}.bin"
            path.touch()
            os.truncate(path, sizes.get(name, 0))  # what came after the last commit
            self._files[name] = path.open("ab")
        self.rows = sizes.get("rows", 0) // ROW.itemsize
        self._tokens = sizes.get("ids", 0) // FILES["ids"].itemsize
        self._bytes = sizes.get("records", 0)
        self._labels = sizes.get("labels", 0) // LABEL.itemsize

    def append(
        self,
        examples: Sequence[Example],
        documents: Sequence[Document],
        flags: Sequence[int],
        source: int,
    ) -> None:
        """Rows of one source, each as an example and its document."""
        if not documents:
            return
        counts = np.array([len(document.ids) for document in documents], np.int64)
        firsts = np.cumsum(counts) - counts
        ids = np.concatenate([document.ids for document in documents])
        weights = np.concatenate([document.weights for document in documents])
        trained = weights > 0
        labels = [d.labels for d in documents if d.labels is not None]
        if labels:
            told = np.concatenate(labels)
            said: np.ndarray = told.view("u1").reshape(len(told), -1)
            ends = np.cumsum([len(each) for each in labels])
            begins = np.concatenate([[0], ends[:-1]])
            counted = ends - begins
        else:
            said = ids[trained]
            before = np.concatenate([[0], np.cumsum(trained)])  # trained tokens before each token
            begins, ends = before[firsts], before[firsts + counts]
            counted = ends - before[np.minimum(firsts + 1, firsts + counts)]
        records = [self._record(example) for example in examples]
        sizes = np.array([len(record) for record in records], np.int64)

        table = np.zeros(len(examples), ROW)
        table["first_token"] = self._tokens + firsts
        table["first_byte"] = self._bytes + np.cumsum(sizes) - sizes
        table["key"] = [
            xxhash.xxh3_64_intdigest(record[record.index(b"\n") + 1 :]) for record in records
        ]
        table["answer"] = [
            xxhash.xxh3_64_intdigest(said.data[begin:end])
            for begin, end in zip(begins.tolist(), ends.tolist(), strict=True)
        ]
        table["tokens"] = counts
        table["trained"] = counted
        table["second"] = [document.second for document in documents]
        table["flags"] = flags
        table["source"] = source

        if labels:
            table["first_label"] = self._labels + begins
            self._files["labels"].write(told.tobytes())
            self._labels += len(told)
        self._files["ids"].write(ids.tobytes())
        self._files["weights"].write(self._codes(weights, trained, documents).tobytes())
        self._files["records"].write(b"".join(records))
        self._files["rows"].write(table.tobytes())
        self._tokens += len(ids)
        self._bytes += int(sizes.sum())
        self.rows += len(table)

    @staticmethod
    def _record(example: Example) -> bytes:
        where = example.where.replace("\n", " ").encode(errors="replace")
        return where + b"\n" + example.key.encode()

    def _codes(
        self, weights: np.ndarray, trained: np.ndarray, documents: Sequence[Document]
    ) -> np.ndarray:
        """A weight's place in the palette, for each token."""
        if np.array_equal(weights, trained):  # ones and zeros
            return trained.view(np.uint8)
        for document in documents:
            for value in np.unique(document.weights).tolist():
                self.palette.setdefault(value, len(self.palette))
            if len(self.palette) > 256:
                raise UserError(
                    f"{document.where}: more than 256 different weights of messages; round them"
                )
        values, inverse = np.unique(weights, return_inverse=True)
        return np.array([self.palette[v] for v in values.tolist()], np.uint8)[inverse]

    def commit(self, complete: bool = False) -> None:
        """What was appended so far stays, whatever happens now."""
        sizes = {}
        for name, file in self._files.items():
            file.flush()
            if complete:
                os.fsync(file.fileno())
            sizes[name] = file.tell()
        content = {
            "bytes": sizes,
            "weights": list(self.palette),
            "state": self.state,
            "complete": complete,
        }
        if complete:
            paths = [self.folder / f"{name}.bin" for name in FILES]
            content["checksums"] = {path.stem: digest(path) for path in paths}
        write_sealed(self.folder / "state.json", content)

    def close(self) -> None:
        for file in self._files.values():
            file.close()


class StoredRows:
    """The rows of a complete folder. table: a ROW for each."""

    def __init__(self, folder: Path) -> None:
        content = read_state(folder)
        self.folder = folder
        self.state: dict[str, Any] = content["state"]
        self.fingerprints: list[str] = []
        """Of the sources, where it was built from them."""
        self._palette = np.array(content["weights"], np.float32)
        self.table, self._ids, self._codes, self._records, self._labels = (
            _mapped(folder / f"{name}.bin", kind) for name, kind in FILES.items()
        )

    def __len__(self) -> int:
        return len(self.table)

    def document(self, row: int, start: int = 0, stop: int | None = None) -> Document:
        """Tokens [start, stop) of a row."""
        line = self.table[row]
        first, count = int(line["first_token"]), int(line["tokens"])
        part = slice(first + start, first + (count if stop is None else stop))
        ids = np.array(self._ids[part])
        found = Document(ids, self._palette[self._codes[part]], self.where(row))
        if not len(self._labels):
            return found
        begin = int(line["first_label"])
        labels = np.array(self._labels[begin : begin + int(line["trained"])])
        labels = labels_within(labels, start, start + len(ids))
        return replace(found, labels=labels, second=int(line["second"]))

    def targets(self, rows_N: np.ndarray) -> np.ndarray:
        """Of all labels of these rows, one after another."""
        lines = self.table[rows_N]
        firsts, counts = (lines[name].astype(np.int64) for name in ("first_label", "trained"))
        if not len(rows_N):
            return np.zeros(0, np.float32)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return np.array(self._labels["target"][np.repeat(firsts, counts) + within])

    def trained(self, row: int, start: int, stop: int) -> int:
        """Trained tokens of [start, stop), its first one not counted."""
        if len(self._labels):
            return self.document(row, start, stop).trained_tokens
        first = int(self.table[row]["first_token"])
        codes = self._codes[first + start + 1 : first + stop]
        return int(np.count_nonzero(self._palette[codes]))

    def where(self, row: int) -> str:
        return self._record(row)[0].decode()

    def example(self, row: int) -> Example:
        where, key = self._record(row)
        return Example.from_key(where.decode(), key.decode())

    def _record(self, row: int) -> tuple[bytes, bytes]:
        first = int(self.table[row]["first_byte"])
        last = row + 1 == len(self.table)
        stop = len(self._records) if last else int(self.table[row + 1]["first_byte"])
        where, _, key = self._records[first:stop].tobytes().partition(b"\n")
        return where, key


def text_tokens(rows: np.ndarray) -> np.ndarray:
    """Tokens of the text of each ROW; of a pair, of the longer one."""
    seconds = rows["second"].astype(np.int64)
    return np.maximum(seconds, rows["tokens"] - seconds)


def read_state(folder: Path) -> dict[str, Any]:
    """What the last commit wrote; empty where there was none, or it is damaged."""
    content = read_sealed(folder / "state.json")
    if content is None:
        return {}
    sizes = content["bytes"]
    whole = all(
        (path := folder / f"{name}.bin").is_file() and path.stat().st_size >= sizes[name]
        for name in FILES
    )
    return content if whole else {}


def damaged(folder: Path) -> Path | None:
    """A file of a complete folder that has not its checksum, if there is one."""
    sums = read_state(folder)["checksums"]
    paths = [folder / f"{name}.bin" for name in FILES]
    return next((path for path in paths if digest(path) != sums[path.stem]), None)


def write_sealed(path: Path, content: dict[str, Any]) -> None:
    """JSON with its own checksum in it."""
    write_text(path, json.dumps(content | {"checksum": _checksum(content)}))


def read_sealed(path: Path) -> dict[str, Any] | None:
    """What `write_sealed` wrote; None where there is no file or it is damaged."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        sound = content.pop("checksum", None) == _checksum(content)
    except (FileNotFoundError, ValueError, AttributeError):
        return None
    return content if sound else None


def _checksum(content: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content).encode())


def _mapped(path: Path, kind: np.dtype[Any]) -> np.ndarray:
    if not path.stat().st_size:
        return np.zeros(0, kind)
    return np.memmap(path, kind, mode="r")
