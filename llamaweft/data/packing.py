"""Which documents share a pack, in which order: best-fit decreasing, along the tree of prefixes.

A pack pays for a shared beginning once. So documents below the same run of the tree (prefixes.py)
are packed together first, and what is not full goes on to the run above; where nothing is shared
that is plain best-fit decreasing. Deterministic in seed and epoch. Packs are shuffled after
packing, so that their order does not follow length.

A pack is often a whole optimizer step, and documents that begin alike mean much the same. So for
training only long beginnings bring documents together (GROUP_TOKENS), or those of nearly all: a
context with several questions, a system message, and not the first words of a sentence (docs/log.md
has what that costs).

N: documents
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np

from llamaweft.prefixes import PrefixTree

WINDOW_DOCUMENTS, BLOCK_DOCUMENTS = 2**16, 2**6
"""Documents whose beginnings are compared and whose packs are shuffled; it bounds the memory of
packing. Neighbours that stay together where there are more."""

GROUP_TOKENS, NEARLY_ALL = 64, 0.9
"""Training packs documents together for so many tokens that they begin with in common, beyond what
brings them together already; or for fewer, where so large a share of all begins with them."""

WINDOW = 4096
"""What is fitted into bins together; it bounds the time of packing."""


@dataclass
class Bin:
    """Documents by index, and the tokens that are computed for them."""

    documents: list[int]
    tokens: int


def epoch_windows(weights_N: np.ndarray, seed: int, epoch: int) -> list[np.ndarray]:
    """The documents of one epoch, by index, in windows that are packed one by one.

    weights_N: how often each is seen in an epoch; its fraction is drawn (at least one document
    is). Up to WINDOW_DOCUMENTS there is one window. More are dealt to windows at random in blocks
    of neighbours, since neighbours in a file often begin alike.
    """
    random = np.random.default_rng([seed, epoch])
    times = np.floor(weights_N).astype(int)
    times += random.random(len(weights_N)) < (weights_N - times)
    if not times.any():
        times[random.integers(len(times))] = 1
    shown = np.repeat(np.arange(len(weights_N)), times)
    if len(shown) <= WINDOW_DOCUMENTS:
        return [random.permutation(shown)]
    blocks = np.split(shown, np.arange(BLOCK_DOCUMENTS, len(shown), BLOCK_DOCUMENTS))
    dealt = np.concatenate([blocks[i] for i in random.permutation(len(blocks))])
    windows = np.split(dealt, np.arange(WINDOW_DOCUMENTS, len(dealt), WINDOW_DOCUMENTS))
    return [random.permutation(window) for window in windows]


def pack_window(
    tree: PrefixTree,
    order: list[int],
    capacity: int,
    random: np.random.Generator,
    group_tokens: int = 0,
) -> list[Bin]:
    """The packs of one window, in random order.

    tree: of all documents that `order` names by index. capacity: tokens that a pack computes. A
    longer document is a pack of its own. Copies of a document never share a pack because they are
    copies. group_tokens: shorter beginnings, but for those of nearly all, bring no documents
    together; those that share a pack all the same are computed once.
    """
    packs: list[Bin] = []
    groups = _groups(tree, group_tokens)
    for documents in _without_copies(order):
        packs += _pack(tree, groups, documents, capacity)
    for pack in packs if tree.ends or group_tokens else ():  # they share more than was counted
        pack.tokens = tree.tokens_of(pack.documents)
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


def _groups(tree: PrefixTree, least: int) -> list[int]:
    """For each run the nearest one from it to its root that brings documents together, or -1: one
    that adds so many tokens to the one above it that does, or that nearly all documents have."""
    below = [0] * len(tree.runs)
    for last in tree.last:
        below[last] += last >= 0
    for index in reversed(range(len(tree.runs))):
        if tree.runs[index].parent >= 0:
            below[tree.runs[index].parent] += below[index]
    found: list[int] = []
    for index, run in enumerate(tree.runs):
        above = _group(found, run.parent)
        is_long = run.stop - _stop(tree, above) >= least
        found.append(index if is_long or below[index] >= NEARLY_ALL * len(tree.last) else above)
    return found


def _group(groups: list[int], run: int) -> int:
    return groups[run] if run >= 0 else -1


def _stop(tree: PrefixTree, run: int) -> int:
    return tree.runs[run].stop if run >= 0 else 0


def _pack(tree: PrefixTree, groups: list[int], documents: list[int], capacity: int) -> list[Bin]:
    """From the leaves to the root: what is below a run into bins, which then pay for the run."""
    rank = {document: place for place, document in enumerate(documents)}
    below: defaultdict[int, list[Bin]] = defaultdict(list)
    for document in documents:
        last = tree.last[document]
        group = _group(groups, last)
        beyond = _stop(tree, last) - _stop(tree, group)
        below[group].append(Bin([document], beyond + tree.tokens_below(document)))
    for index in reversed(range(len(tree.runs))):
        if groups[index] != index:
            continue
        run = tree.runs[index]
        above = _group(groups, run.parent)
        for filled in _fill(below.pop(index, []), capacity - run.stop, rank):
            filled.tokens += run.stop - _stop(tree, above)
            below[above].append(filled)
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
