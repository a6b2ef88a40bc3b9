"""Leakage: what is measured on and is, as a whole or in part, in what is learnt.

Texts are compared by their runs of n words (n-grams), without case and punctuation: T. Brown et
al., "Language Models are Few-Shot Learners" (2020), appendix C, which takes 13. A run of words is
one 64-bit number, h = sum of hash(word_i) P^(n-i) modulo 2^64.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

NGRAM_WORDS = 13
COMMON_ROWS = 10
"""A run of words in more held-out rows than these is common wording, and does not count."""
LEAK_SHARE = 0.5

_MULTIPLIER = 0x9E3779B97F4A7C15  # odd, so that no bit of a word is lost
_SLOTS = 8  # of the first look, for each n-gram: so seven of eight strangers stop there


_ASCII_WORD = re.compile(rb"[a-z0-9]+")
_UNSPACED = re.compile(  # Thai, Lao, Burmese, Khmer, Japanese and Chinese
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\U00020000-\U0003ffff]"
)


@dataclass(frozen=True)
class Leak:
    """A held-out text found in what is learnt. share: the part of its n-grams that is found.
    shared: the first run of words that both have, as the learnt text writes it."""

    reference_where: str
    share: float
    shared: str

    @property
    def verdict(self) -> str:
        """leak: at least half of the held-out text is found. overlap: less."""
        return "leak" if self.share >= LEAK_SHARE else "overlap"


class Leakage:
    """Held-out texts are added first; then every text that is learnt is checked, one by one.

    A text of fewer than `ngram` words is compared as a whole; one without words is not compared.
    """

    def __init__(self, ngram: int = NGRAM_WORDS) -> None:
        self._ngram = ngram
        self._where: list[str] = []
        self._grams: list[np.ndarray] = []
        self._index: _Index | None = None
        self._shared: dict[int, str] = {}

    def add_reference(self, where: str, text: str) -> None:
        """A held-out text, and where it stands."""
        if self._index is not None:
            raise RuntimeError("held-out texts are added before anything is checked")
        self._where.append(where)
        self._grams.append(np.unique(ngrams(text, self._ngram)))

    def check(self, text: str) -> Leak | None:
        """The held-out text of which this one holds the largest share (the first of several), or
        None."""
        if self._index is None:
            self._index = _Index(self._grams)
            self._grams = []
        index = self._index
        grams = ngrams(text, self._ngram)
        at, entries = index.find(grams)
        if not len(entries):
            return None
        index.covered[entries] = True
        rows, counts = np.unique(index.rows[entries], return_counts=True)
        text = composed(text)
        spans = word_spans(text)
        runs = {}
        for row in rows.tolist():
            held = index.hashes[entries[index.rows[entries] == row]]
            places = spans[_first_run(at[np.isin(grams[at], held)], self._ngram)]
            runs[row] = text[places[0][0] : places[-1][1]]
            self._shared.setdefault(row, runs[row])
        shares = counts / index.totals[rows]
        best = int(shares.argmax())
        row = int(rows[best])
        return Leak(self._where[row], float(shares[best]), runs[row])

    def found(self) -> list[Leak]:
        """Every held-out text of which something is in the texts checked so far, taken together:
        one that is spread over many of them is learnt as well."""
        if self._index is None:
            return []
        index = self._index
        counts = np.bincount(index.rows[index.covered], minlength=len(self._where))
        return [
            Leak(self._where[row], float(counts[row] / index.totals[row]), self._shared[row])
            for row in np.flatnonzero(counts).tolist()
        ]


class _Index:
    """N-grams of all held-out texts, sorted, each with its text; common wording left out.

    covered: which of them were found. totals: how many each text has.
    """

    def __init__(self, grams: list[np.ndarray]) -> None:
        hashes = np.concatenate([np.empty(0, np.uint64), *grams])
        rows = np.repeat(np.arange(len(grams), dtype=np.uint32), [len(g) for g in grams])
        order = np.argsort(hashes, kind="stable")
        hashes, rows = hashes[order], rows[order]
        first = np.flatnonzero(np.diff(hashes, prepend=~hashes[:1]))
        counts = np.diff(first, append=len(hashes))
        kept = np.repeat(counts <= COMMON_ROWS, counts)
        self.hashes, self.rows = hashes[kept], rows[kept]
        self.totals = np.bincount(self.rows, minlength=len(grams))
        self.covered = np.zeros(len(self.hashes), bool)
        bits = max(16, (_SLOTS * len(self.hashes)).bit_length())
        self._shift = np.uint64(64 - bits)
        self._slots = np.zeros(1 << bits, bool)
        self._slots[self.hashes >> self._shift] = True

    def find(self, grams: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which of `grams` are known, and all entries of these."""
        at = np.flatnonzero(self._slots[(grams >> self._shift).view(np.int64)])
        if not len(at):  # so it is for nearly every text
            return at, at
        low = np.searchsorted(self.hashes, grams[at], "left")
        high = np.searchsorted(self.hashes, grams[at], "right")
        known = high > low
        ranges = [np.arange(a, b) for a, b in zip(low[known], high[known], strict=True)]
        return at[known], np.unique(np.concatenate([np.empty(0, np.intp), *ranges]))


def _first_run(at: np.ndarray, size: int) -> slice:
    """The words of the n-grams that begin at `at`, up to the first gap."""
    gaps = np.flatnonzero(np.diff(at) > 1)
    last = at[gaps[0]] if len(gaps) else at[-1]
    return slice(int(at[0]), int(last) + size)


def ngrams(text: str, size: int) -> np.ndarray:
    """A number for each run of `size` words, in order; the same on every machine.

    One number for a text of fewer words, none for one without words. Case, punctuation and the form
    of Unicode make no difference.
    """
    hashes = _word_hashes(composed(text))
    size = min(size, len(hashes))
    if not size:
        return hashes
    powers = _POWERS[-size:] if size <= len(_POWERS) else _powers(size)
    return np.correlate(hashes, powers, "valid")


def _powers(size: int) -> np.ndarray:
    """P^size ... P^1, modulo 2^64."""
    return np.cumprod(np.full(size, _MULTIPLIER, np.uint64))[::-1].copy()


_POWERS = _powers(64)  # made once for the usual sizes


def composed(text: str) -> str:
    """One form of Unicode, so that an accent written apart makes no other word."""
    return text if text.isascii() else unicodedata.normalize("NFKC", text)


def word_spans(text: str) -> list[tuple[int, int]]:
    """Where each word begins and ends."""
    return [match.span() for match in _pattern(text).finditer(text)]


def _word_hashes(text: str) -> np.ndarray:
    from xxhash import xxh3_64_intdigest as digest

    if text.isascii():  # twice as fast
        found = _ASCII_WORD.findall(text.lower().encode())
    else:
        found = [word.encode() for word in _pattern(text).findall(text.casefold())]
    return np.array([digest(word) for word in found], np.uint64)


def _pattern(text: str) -> Any:
    spaced, mixed = _patterns()
    return mixed if _UNSPACED.search(text) else spaced


@lru_cache(maxsize=1)
def _patterns() -> tuple[Any, Any]:
    """A word: letters and digits with their marks. In scripts that put no space between words,
    every character is taken for one."""
    import regex  # knows the marks of Unicode; `re` cuts words of many scripts at their vowels

    letters = r"[\p{L}\p{N}\p{M}]"
    unspaced = _UNSPACED.pattern
    return (
        regex.compile(f"{letters}+"),
        regex.compile(rf"(?V1)[{letters}--{unspaced}]+|{unspaced}\p{{M}}*"),
    )
