"""The stream of optimizer steps: each a list of packs, at any position, without state to lose.

Packs follow one another over the epochs. The position in the stream is the number of packs
taken, so going on from a checkpoint is exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Generic, TypeVar

import numpy as np

from llamaweft.data.chat import Document
from llamaweft.data.packing import Bin, pack_epoch
from llamaweft.prefixes import prefix_tree, unshared

Batch = TypeVar("Batch")


class Loader(Generic[Batch]):
    """Steps of `accumulation` packs each, made by `collate` from lists of documents.

    weights: how often each document is seen in an epoch.
    epochs: length of the run in epochs, unless max_steps is given.
    share: whether a pack computes once what its documents begin with in common.
    """

    def __init__(
        self,
        documents: Sequence[Document],
        collate: Callable[[list[Document]], Batch],
        *,
        micro_batch_tokens: int,
        accumulation: int,
        epochs: float = 1,
        max_steps: int | None = None,
        weights: np.ndarray | None = None,
        seed: int = 0,
        share: bool = False,
    ) -> None:
        self.documents, self.collate = documents, collate
        self.micro_batch_tokens, self.accumulation = micro_batch_tokens, accumulation
        self.seed, self.share = seed, share
        ids = [document.ids for document in documents]
        self._lengths = np.array([len(i) for i in ids])
        self._tree = prefix_tree(ids) if share else unshared(self._lengths)
        self._labels = np.array([document.trained_tokens for document in documents])
        self._weights = np.ones(len(documents)) if weights is None else weights
        self._epoch = lru_cache(maxsize=2)(self._pack_epoch)
        self.total_packs = self._count_packs(epochs, max_steps)
        self.total_steps = math.ceil(self.total_packs / accumulation)

    def _pack_epoch(self, epoch: int) -> list[Bin]:
        return pack_epoch(self._tree, self._weights, self.micro_batch_tokens, self.seed, epoch)

    def _count_packs(self, epochs: float, max_steps: int | None) -> int:
        if max_steps is not None:
            return max_steps * self.accumulation
        whole = math.floor(epochs)
        packs = sum(len(self._epoch(epoch)) for epoch in range(whole))
        if epochs > whole:
            packs += math.ceil((epochs - whole) * len(self._epoch(whole)))
        return packs

    def steps(self, start_step: int = 0) -> Iterator[list[Batch]]:
        """The packs of each step from `start_step` to the end of the run."""
        packs = self._packs(start_step * self.accumulation)
        for step in range(start_step, self.total_steps):
            taken = step * self.accumulation
            count = min(self.accumulation, self.total_packs - taken)
            yield [self.collate(next(packs)) for _ in range(count)]

    def _packs(self, skip: int) -> Iterator[list[Document]]:
        epoch = 0
        while True:
            packs = self._epoch(epoch)
            for pack in packs[skip:]:
                yield [self.documents[index] for index in pack.documents]
            skip = max(0, skip - len(packs))
            epoch += 1

    @property
    def packs_per_epoch(self) -> int:
        return len(self._epoch(0))

    @property
    def epoch_tokens(self) -> tuple[int, int, int]:
        """Of the first epoch: tokens as given, tokens that are computed, labels."""
        shown, computed = self._shown, sum(pack.tokens for pack in self._epoch(0))
        return int(self._lengths[shown].sum()), computed, int(self._labels[shown].sum())

    @property
    def epoch_squares(self) -> int:
        """Sum of L^2 over the documents of the first epoch, L tokens: attention's work."""
        return int((self._lengths[self._shown].astype(np.int64) ** 2).sum())

    @property
    def _shown(self) -> list[int]:
        """Documents of the first epoch, one more than once where it is shown so often."""
        return [index for pack in self._epoch(0) for index in pack.documents]

    @property
    def largest_pack(self) -> tuple[int, int]:
        """(tokens, labels) that no pack exceeds; labels are those of the first epoch's packs and
        a tenth more, since other epochs are packed otherwise."""
        packs = self._epoch(0)
        most = max(int(self._labels[pack.documents].sum()) for pack in packs)
        tokens = max(pack.tokens for pack in packs)
        if self.total_packs > len(packs):
            tokens = min(max(self.micro_batch_tokens, tokens), int(self._lengths.sum()))
        labels = most + most // 10
        return tokens, labels if self.share else min(tokens, labels)
