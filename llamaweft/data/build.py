"""Rows are prepared once: read, cleaned, rendered, tokenised, looked at, and kept in the cache
under a digest of all that decides them. A preparation that was stopped goes on from its last
chunk.

Tokenising runs in a thread beside the rest, on every core: the tokenizers library needs no Python.
"""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import xxhash

from llamaweft.data.chat import Encoder
from llamaweft.data.cleaning import ROW_STEPS, Cleaner, Removed, texts_of
from llamaweft.data.duplicates import NearDuplicates
from llamaweft.data.example import Example
from llamaweft.data.formats import ShapeOfFile, to_examples
from llamaweft.data.observe import Flag, Observer
from llamaweft.data.sources import BadRows, Row, Source, fingerprint, read_rows
from llamaweft.data.store import StoredRows, Writer, damaged, read_state
from llamaweft.data.targets import TargetEncoder
from llamaweft.data.template import Rendered
from llamaweft.errors import UserError
from llamaweft.files import locked
from llamaweft.runtime import cache_dir

VERSION = 5
"""Of what is kept in the cache; another one is prepared again."""

CHUNK = 2048
"""Rows that are tokenised in one call."""

CHUNKS_A_COMMIT = 8

OBJECTS_BETWEEN_COLLECTIONS = 50_000

PAIRS_KEPT = 100
"""Of near duplicates, to be looked at side by side."""

SAID_BY = ("user", "assistant", "tool")


@dataclass(frozen=True)
class Chunk:
    """Examples of one source, and what is needed to go on after them."""

    examples: list[Example]
    source: int
    state: dict[str, Any]


@dataclass(frozen=True)
class Build:
    """Sources, and all that decides what becomes of their rows."""

    sources: Sequence[Source]
    task: str
    encoder: Encoder | TargetEncoder
    observer: Observer
    clean: Sequence[dict[str, Any]]
    on_bad_row: str
    report: Callable[[int], None]
    say: Callable[[str], None]

    def stored(self) -> StoredRows:
        """The prepared rows. Raises UserError, naming the row, for what cannot be read; nothing
        is left in the cache then."""
        folder = cache_dir() / "prepared" / self._digest()
        with locked(folder.parent / f".{folder.name}.lock"):  # a second process waits for the rows
            complete = read_state(folder).get("complete")
            if complete and (file := damaged(folder)) is not None:
                self.say(f"{file} is damaged, so the rows are prepared again")
                shutil.rmtree(folder)
                complete = False
            if not complete:
                try:
                    self._write(folder)
                except UserError:
                    shutil.rmtree(folder, ignore_errors=True)
                    raise
                except OSError as error:
                    raise UserError(
                        f"{folder} cannot be written: {error.strerror or error}; free some room "
                        "or set LLAMAWEFT_CACHE to another folder"
                    ) from None
        stored = StoredRows(folder)
        stored.fingerprints = self.fingerprints
        return stored

    @cached_property
    def fingerprints(self) -> list[str]:
        """A hash of what each source holds."""
        return [fingerprint(source) for source in self.sources]

    def _digest(self) -> str:
        tokenizer = self.encoder.tokenizer
        decides = [
            VERSION,
            self.task,
            self.encoder.train_on,
            xxhash.xxh3_128_hexdigest(self.encoder.core.to_str().encode()),
            tokenizer.chat_template,
            tokenizer.special_tokens_map,
            [
                [held, source.format, source.columns]
                for held, source in zip(self.fingerprints, self.sources, strict=True)
            ],
            [step for step in self.clean if step["step"] not in ("duplicates", "leakage")],
            self.on_bad_row,
            self.observer.vocab_size,
            self.observer.untrained.tolist(),
        ]
        return xxhash.xxh3_128_hexdigest(json.dumps(decides, default=str).encode())

    def _write(self, folder: Path) -> None:
        writer = Writer(folder)
        if isinstance(self.encoder, TargetEncoder):
            self.encoder.restore(writer.state)
        try:
            near = self._near_duplicates(folder, writer.rows)
            with _only_new_garbage(), ThreadPoolExecutor(1) as tokenising:
                waiting: tuple[Chunk, list[Rendered], Future[list[Any]]] | None = None
                for number, chunk in enumerate(self._chunks(writer.state), start=1):
                    texts = self.encoder.render(chunk.examples)
                    encodings = tokenising.submit(self.encoder.tokenise, texts)
                    if waiting is not None:
                        self._finish(writer, near, *waiting)
                        if number % CHUNKS_A_COMMIT == 0:
                            writer.commit()
                    waiting = chunk, texts, encodings
                if waiting is not None:
                    self._finish(writer, near, *waiting)
            writer.commit(complete=True)
        finally:
            writer.close()

    def _finish(
        self,
        writer: Writer,
        near: NearDuplicates | None,
        chunk: Chunk,
        texts: list[Rendered],
        encodings: Future[list[Any]],
    ) -> None:
        documents = self.encoder.documents(chunk.examples, texts, encodings.result())
        flags: list[int] = []
        pairs = list(writer.state.get("near_duplicates", []))
        for example, text, document in zip(chunk.examples, texts, documents, strict=True):
            seen = self.observer.flags(example, text, document)
            row = writer.rows + len(flags)
            earlier = None if near is None else _repeated(near, row, example)
            if earlier is not None:
                seen |= Flag.NEAR_DUPLICATE
                pairs.append((row, earlier))
            flags.append(seen)
        writer.append(chunk.examples, documents, flags, chunk.source)
        writer.state = chunk.state | {"near_duplicates": pairs[:PAIRS_KEPT]}
        if isinstance(self.encoder, TargetEncoder):
            writer.state |= self.encoder.state
        self.report(writer.rows)

    def _chunks(self, state: dict[str, Any]) -> Iterator[Chunk]:
        """Cleaned examples, from where `state` says."""
        unreadable = BadRows(self.on_bad_row)
        misshapen = BadRows(self.on_bad_row)
        _restore(unreadable, state.get("unreadable", [0, []]))
        _restore(misshapen, state.get("misshapen", [0, []]))
        cleaner = self._cleaner()
        cleaner.removed = [Removed(**r) for r in state.get("cleaning", [])] or cleaner.removed
        first, skip = state.get("source", 0), state.get("rows_read", 0)
        for number, source in enumerate(self.sources[first:], start=first):
            before = [unreadable.count, list(unreadable.examples)]
            rows = _Counted(read_rows(source, unreadable))
            for _ in islice(rows, skip if number == first else 0):
                pass  # prepared before; what could not be read is counted again
            shape = ShapeOfFile(**state.get("shape", {})) if number == first else ShapeOfFile()
            found = to_examples(rows, self.task, source.format, source.columns, misshapen, shape)
            cleaned = (kept for e in found if (kept := cleaner(e)) is not None)
            full = True
            while full:  # the last chunk says what was left out after the last row, too
                examples = list(islice(cleaned, CHUNK))
                full = len(examples) == CHUNK
                yield Chunk(
                    examples,
                    number,
                    {
                        "source": number,
                        "rows_read": rows.count,
                        "shape": asdict(shape),
                        "unreadable": before,
                        "misshapen": [misshapen.count, list(misshapen.examples)],
                        "cleaning": [asdict(removed) for removed in cleaner.removed],
                        "bad_rows": unreadable.count + misshapen.count,
                        "bad_examples": [*unreadable.examples, *misshapen.examples],
                    },
                )

    def _cleaner(self) -> Cleaner:
        """The steps that look at one row."""
        steps = [dict(step) for step in self.clean if step["step"] in ROW_STEPS]
        return Cleaner([ROW_STEPS[step.pop("step")](**step) for step in steps])

    def _near_duplicates(self, folder: Path, rows: int) -> NearDuplicates | None:
        """What finds them, told the rows that were prepared before."""
        step = next((step for step in self.clean if step["step"] == "near_duplicates"), None)
        if step is None:
            return None
        near = NearDuplicates(step["threshold"])
        every = sum(1 for source in self.sources for _ in read_rows(source, BadRows("skip")))
        self.say(near.announce(every, psutil.virtual_memory().available))
        if rows:
            stored = StoredRows(folder)
            for row in range(rows):
                _repeated(near, row, stored.example(row))
        return near


@contextmanager
def _only_new_garbage() -> Iterator[None]:
    """Python's collector looks at what is made from here on only: else it goes through all that the
    libraries hold, again and again, in a tenth of the time (docs/log.md). And it looks more seldom:
    rows hold no cycles."""
    gc.collect()
    gc.freeze()
    before = gc.get_threshold()
    gc.set_threshold(OBJECTS_BETWEEN_COLLECTIONS, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


class _Counted(Iterator[Row]):
    """Rows, and how many were taken."""

    def __init__(self, rows: Iterator[Row]) -> None:
        self.rows, self.count = rows, 0

    def __next__(self) -> Row:
        row = next(self.rows)
        self.count += 1
        return row


def _restore(bad: BadRows, state: list[Any]) -> None:
    bad.count, bad.examples = state[0], list(state[1])


def _repeated(near: NearDuplicates, row: int, example: Example) -> int | None:
    """The earlier row that this one nearly repeats."""
    said = texts_of(example, SAID_BY)  # one system message for all makes no two rows alike
    return near.add(row, "\n".join(said))
