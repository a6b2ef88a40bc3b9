"""Documents that begin alike, as a tree: which run of tokens belongs to which of them.

Each run of tokens stands once in the tree, however many documents begin with it. A document is the
path from a root to its last run. Beginnings are shared in whole blocks of 8 tokens: what two
documents share then depends on no third one, and nothing is cut up for a word in common.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise

import numpy as np

BLOCK_TOKENS = 8
"""A shared run saves its tokens once for each further document, and costs each of them one more
range of keys in attention."""


@dataclass(frozen=True)
class Run:
    """Tokens [start, stop) of `document` and of every other document below; parent: the run before
    it, an earlier one in the tree, or -1."""

    start: int
    stop: int
    parent: int
    document: int

    @property
    def tokens(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class PrefixTree:
    """runs: depth first, so that what is below a run follows it. last: the run that each document
    ends with; of a pair of texts the last run that both have, or -1. ends: where documents may be
    pairs, the runs that the texts of each end with."""

    runs: list[Run]
    last: list[int]
    ends: list[list[int]] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Tokens that are computed once each."""
        return sum(run.tokens for run in self.runs)

    def path(self, document: int) -> list[int]:
        """The runs of a document, the first one first."""
        return self._way(self.last[document])

    def _way(self, run: int) -> list[int]:
        """The runs from a root to this one."""
        found = []
        while run >= 0:
            found.append(run)
            run = self.runs[run].parent
        return found[::-1]

    def of_documents(self, texts: Iterable[Sequence[int]]) -> PrefixTree:
        """This tree of texts as one of documents, whose texts are given by index."""
        ends = [[self.last[text] for text in of] for of in texts]
        return PrefixTree(self.runs, [self._fork(of) for of in ends], ends)

    def _fork(self, ends: Sequence[int]) -> int:
        """The last run on the ways to all of these, or -1."""
        shared = -1
        for runs in zip(*map(self._way, ends), strict=False):
            if len(set(runs)) > 1:
                break
            shared = runs[0]
        return shared

    def tokens_of(self, documents: Iterable[int]) -> int:
        """Tokens that are computed for these documents together."""
        ends = (self.ends[index] if self.ends else [self.last[index]] for index in documents)
        runs = {run for of in ends for end in of for run in self._way(end)}
        return sum(self.runs[run].tokens for run in runs)

    def tokens_below(self, document: int) -> int:
        """Tokens of a document that come after its run in `last`: of a pair, both ends."""
        if not self.ends:
            return 0
        fork = self.last[document]
        return self.tokens_of([document]) - (self.runs[fork].stop if fork >= 0 else 0)

    def places(self, document: int) -> np.ndarray:
        """Where each token of a document stands when all runs follow one another."""
        spans = [(self._starts[r], self.runs[r].tokens) for r in self.path(document)]
        return np.concatenate([np.arange(start, start + count) for start, count in spans])

    @cached_property
    def _starts(self) -> list[int]:
        return [0, *accumulate(run.tokens for run in self.runs)]


def texts_within(ids: np.ndarray, second: int) -> list[np.ndarray]:
    """The texts of a document: of a pair, whose second text begins at token `second`, two."""
    return [ids[:second], ids[second:]] if second else [ids]


def numbered(groups: Iterable[Sized]) -> list[range]:
    """For each group, the places of its members when all follow one another."""
    ends = [0, *accumulate(map(len, groups))]
    return [range(start, end) for start, end in pairwise(ends)]


def unshared(lengths: Iterable[int]) -> PrefixTree:
    """Each document a run of its own."""
    runs = [Run(0, int(n), -1, i) for i, n in enumerate(lengths)]
    return PrefixTree(runs, list(range(len(runs))))


def prefix_tree(ids: Sequence[np.ndarray]) -> PrefixTree:
    """The tree of documents given as token ids; any number of levels.

    In sorted order, documents that begin alike are neighbours, and what a range of neighbours has
    in common is the least that two of them do.
    """
    order = sorted(range(len(ids)), key=lambda i: ids[i].astype(">u4").tobytes())
    common = np.zeros(len(order) + 1, np.int64)
    for place, (a, b) in enumerate(pairwise(order), start=1):
        common[place] = _common_tokens(ids[a], ids[b])
    runs: list[Run] = []
    last = [0] * len(order)
    todo = [(low, high, 0, -1) for low, high in _alike(common, 0, len(order), 0)][::-1]
    while todo:
        low, high, start, parent = todo.pop()
        alone = high - low == 1
        stop = len(ids[order[low]]) if alone else int(common[low + 1 : high].min())
        runs.append(Run(start, stop, parent, order[low]))
        while low < high and len(ids[order[low]]) == stop:  # a document that ends sorts first
            last[order[low]] = len(runs) - 1
            low += 1
        below = [(a, b, stop, len(runs) - 1) for a, b in _alike(common, low, high, stop)]
        todo += below[::-1]
    return PrefixTree(runs, last)


def _alike(common: np.ndarray, low: int, high: int, start: int) -> Iterator[tuple[int, int]]:
    """Ranges of neighbours that share more than `start` tokens."""
    if low == high:
        return
    cuts = np.flatnonzero(common[low + 1 : high] <= start) + low + 1
    yield from pairwise([low, *cuts.tolist(), high])


def _common_tokens(a: np.ndarray, b: np.ndarray) -> int:
    """Tokens at the beginning that are the same, in whole blocks."""
    count = min(len(a), len(b))
    differs = a[:count] != b[:count]
    same = int(differs.argmax()) if differs.any() else count
    if same == len(a) == len(b):  # one document, twice
        return same
    return same - same % BLOCK_TOKENS
