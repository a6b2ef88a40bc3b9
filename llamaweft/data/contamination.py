"""Held-out rows in the training rows: as a whole, nearly, or in part.

What is asked and what is answered are compared by themselves (leakage.py): different questions
about one text, or questions with one long answer, are no leak.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import xxhash

from llamaweft.data.cleaning import texts_of
from llamaweft.data.example import Example
from llamaweft.data.leakage import NGRAM_WORDS, Leak, Leakage, ngrams, word_spans
from llamaweft.data.store import StoredRows, read_sealed, write_sealed

MOST_REFERENCES = 20_000
"""Held-out rows that are looked for: their n-grams are held in memory."""

PAIRS_SHOWN = 200
WHOLE = 10**9
"""Words of an n-gram that is a text as a whole."""


@dataclass(frozen=True)
class Pair:
    """A training row and the held-out row that it holds. shared: words in a row in both."""

    row: int
    reference_row: int
    shared: str
    verdict: str


@dataclass(frozen=True)
class Contamination:
    """leaks_N: rows that hold at least half of a held-out row, answer and question. overlaps_N:
    rows that share some words in a row with a held-out answer. pairs: the first of both."""

    leaks_N: list[int] = field(default_factory=list)
    overlaps_N: list[int] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)


def contamination(
    stored: StoredRows,
    rows_N: np.ndarray,
    held: StoredRows,
    held_N: np.ndarray,
    ngram: int = NGRAM_WORDS,
) -> Contamination:
    """What of the first MOST_REFERENCES held-out rows is in the training rows; kept beside the
    prepared rows, so that it is computed once."""
    if not len(rows_N) or not len(held_N):
        return Contamination()
    parts = [rows_N.tobytes(), held.folder.name.encode(), held_N.tobytes(), str(ngram).encode()]
    file = stored.folder / f"leaks-{xxhash.xxh3_64_hexdigest(b'|'.join(parts))}.json"
    if (content := read_sealed(file)) is not None:
        pairs = [Pair(**pair) for pair in content.pop("pairs")]
        return Contamination(**content, pairs=pairs)
    found = Contamination()
    for pair in _pairs(stored, rows_N, held, held_N[:MOST_REFERENCES], ngram):
        (found.leaks_N if pair.verdict == "leak" else found.overlaps_N).append(pair.row)
        if len(found.pairs) < PAIRS_SHOWN:
            found.pairs.append(pair)
    write_sealed(file, asdict(found))
    return found


def _pairs(
    stored: StoredRows, rows_N: np.ndarray, held: StoredRows, held_N: np.ndarray, ngram: int
) -> list[Pair]:
    index = _HeldOut(ngram)
    for row in held_N.tolist():
        index.add(row, held.example(row))
    pairs = []
    for row in rows_N.tolist():
        found = index.find(*asked_and_answered(stored.example(row)))
        if found is not None:
            leak, verdict = found
            pairs.append(Pair(row, index.row[leak.reference_where], leak.shared, verdict))
    spread = index.spread()
    return [replace(p, verdict="leak") if p.reference_row in spread else p for p in pairs]


class _HeldOut:
    """Held-out rows, their questions and answers apart."""

    def __init__(self, ngram: int) -> None:
        self._ngram = ngram
        self._questions, self._answers = Leakage(ngram), Leakage(ngram)
        self.row: dict[str, int] = {}
        self._question: dict[str, bytes] = {}
        self._answered: defaultdict[bytes, set[bytes]] = defaultdict(set)

    def add(self, row: int, example: Example) -> None:
        question, answer = asked_and_answered(example)
        self._questions.add_reference(example.where, question)
        self._answers.add_reference(example.where, answer)
        self.row[example.where] = row
        self._question[example.where] = _whole(question)
        self._answered[_whole(question)].add(_whole(answer))

    def find(self, question: str, answer: str) -> tuple[Leak, str] | None:
        """The held-out row that a training row holds, and whether as a leak or an overlap."""
        answered = self._answers.check(answer)
        asked = self._questions.check(question) if question else None
        if asked is not None and asked.verdict == "leak":
            of = self._question[asked.reference_where]
            if _whole(answer) in self._answered[of]:
                return answered or asked, "leak"
            if answered and answered.verdict == "leak" and self._of(answered) == of:
                return answered, "leak"
        if answered is None or len(word_spans(answered.shared)) < self._ngram:
            return None  # short answers are alike by chance
        return answered, "overlap" if question else answered.verdict

    def spread(self) -> set[int]:
        """Rows of texts that the training rows hold half of, taken together. Answers do not count:
        parts of one may stand under any question."""
        leaks = {leak.reference_where for leak in self._answers.found() if leak.verdict == "leak"}
        return {self.row[where] for where in leaks if not self._question[where]}

    def _of(self, leak: Leak) -> bytes:
        return self._question[leak.reference_where]


def _whole(text: str) -> bytes:
    """Equal for texts that differ in case and punctuation only; empty for one without words."""
    return ngrams(text, WHOLE).tobytes()


def asked_and_answered(example: Example) -> tuple[str, str]:
    """What user and functions say, and what the assistant does; a text is an answer to nothing."""
    if example.text is not None:
        return "", example.text
    asked, answered = texts_of(example, ("user", "tool")), texts_of(example, ("assistant",))
    return "\n".join(asked), "\n".join(answered)
