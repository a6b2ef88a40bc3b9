"""Which documents share a pack, in which order: best-fit decreasing over a window.

Deterministic in seed and epoch. Packs are shuffled after packing, so that their order does
not follow length.
"""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np

WINDOW = 4096
"""Documents that are packed together; bounds the memory and the time of packing."""


def pack_epoch(
    lengths: np.ndarray, weights: np.ndarray, capacity: int, seed: int, epoch: int
) -> list[list[int]]:
    """The packs of one epoch, as lists of document indices.

    lengths: tokens of each document. weights: how often each is seen in an epoch; its fraction
    is drawn (at least one document is). capacity: tokens of a pack. A longer document is a pack
    of its own.
    """
    random = np.random.default_rng([seed, epoch])
    times = np.floor(weights).astype(int)
    times += random.random(len(weights)) < (weights - times)
    if not times.any():
        times[random.integers(len(times))] = 1
    order = random.permutation(np.repeat(np.arange(len(lengths)), times))
    packs: list[list[int]] = []
    for start in range(0, len(order), WINDOW):
        packs += _best_fit(order[start : start + WINDOW], lengths, capacity)
    return [packs[i] for i in random.permutation(len(packs))]


def _best_fit(documents: np.ndarray, lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Longest first, each into the pack that it leaves the least room in."""
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, pack), sorted
    for document in sorted(documents.tolist(), key=lambda d: -lengths[d]):
        length = int(lengths[document])
        place = bisect_left(room, (length, -1))
        if place < len(room):
            free, pack = room.pop(place)
            packs[pack].append(document)
        else:
            free, pack = max(capacity, length), len(packs)
            packs.append([document])
        insort(room, (free - length, pack))
    return packs
