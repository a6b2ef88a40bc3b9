"""Which documents share a pack, in which order: best-fit decreasing, along the tree of prefixes.

A pack pays for a shared beginning once. So documents below the same run of the tree (prefixes.py)
are packed together first, and what is not full goes on to the run above; where nothing is shared
that is plain best-fit decreasing. Deterministic in seed and epoch. Packs are shuffled after
packing, so that their order does not follow length.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np

from llamaweft.prefixes import PrefixTree

WINDOW = 4096
"""Documents that are packed together; bounds the time of packing."""


@dataclass
class Bin:
    """Documents by index, and the tokens that are computed for them."""

    documents: list[int]
    tokens: int


def pack_epoch(
    tree: PrefixTree, weights: np.ndarray, capacity: int, seed: int, epoch: int
) -> list[Bin]:
    """The packs of one epoch.

    tree: of all documents. weights: how often each is seen in an epoch; its fraction is drawn (at
    least one document is). capacity: tokens that a pack computes. A longer document is a pack of
    its own. Copies of a document never share a pack because they are copies.
    """
    random = np.random.default_rng([seed, epoch])
    times = np.floor(weights).astype(int)
    times += random.random(len(weights)) < (weights - times)
    if not times.any():
        times[random.integers(len(times))] = 1
    order = random.permutation(np.repeat(np.arange(len(weights)), times)).tolist()
    packs: list[Bin] = []
    for documents in _without_copies(order):
        packs += _pack(tree, documents, capacity)
    return [packs[i] for i in random.permutation(len(packs))]


def _without_copies(order: list[int]) -> list[list[int]]:
    """The n-th copies of all documents, for each n, in the given order."""
    seen: Counter[int] = Counter()
    rounds: list[list[int]] = []
    for document in order:
        if seen[document] == len(rounds):
            rounds.append([])
        rounds[seen[document]].append(document)
        seen[document] += 1
    return rounds


def _pack(tree: PrefixTree, documents: list[int], capacity: int) -> list[Bin]:
    """From the leaves to the root: what is below a run into bins, which then pay for the run."""
    rank = {document: place for place, document in enumerate(documents)}
    below: defaultdict[int, list[Bin]] = defaultdict(list)
    for document in documents:
        below[tree.last[document]].append(Bin([document], 0))
    for index in reversed(range(len(tree.runs))):
        run = tree.runs[index]
        for filled in _fill(below.pop(index, []), capacity - run.stop, rank):
            filled.tokens += run.tokens
            below[run.parent].append(filled)
    return _fill(below[-1], capacity, rank)


def _fill(bins: list[Bin], capacity: int, rank: dict[int, int]) -> list[Bin]:
    """Best-fit decreasing over windows of bins in their random order."""
    if len(bins) < 2:
        return bins
    bins.sort(key=lambda one: rank[one.documents[0]])
    found: list[Bin] = []
    for start in range(0, len(bins), WINDOW):
        found += _best_fit(bins[start : start + WINDOW], capacity)
    return found


def _best_fit(bins: list[Bin], capacity: int) -> list[Bin]:
    """Largest first, each into the one that it leaves the least room in."""
    found: list[Bin] = []
    room: list[tuple[int, int]] = []  # (free tokens, index into found), sorted
    for one in sorted(bins, key=lambda one: -one.tokens):
        place = bisect_left(room, (one.tokens, -1))
        if place < len(room):
            free, index = room.pop(place)
            found[index].documents += one.documents
            found[index].tokens += one.tokens
        else:
            free, index = max(capacity, one.tokens), len(found)
            found.append(one)
        insort(room, (free - one.tokens, index))
    return found
