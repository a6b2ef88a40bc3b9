"""The stream of optimizer steps: each a list of packs, at any position, without state to lose.

Packs follow one another over the epochs. The position in the stream is the number of packs
taken, so going on from a checkpoint is exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import count, islice
from typing import Generic, TypeVar

import numpy as np

from llamaweft.data.chat import Document
from llamaweft.data.packing import GROUP_TOKENS, WINDOW_DOCUMENTS, Bin, epoch_windows, pack_window
from llamaweft.data.selection import labels_of, lengths_of, squares_of
from llamaweft.prefixes import PrefixTree, numbered, prefix_tree, unshared

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
        self._lengths, self._labels = lengths_of(documents), labels_of(documents)
        self._squares = squares_of(documents)
        self._weights = np.ones(len(documents)) if weights is None else weights
        self._windows = lru_cache(maxsize=2)(self._deal)
        self._packs_of = lru_cache(maxsize=3)(self._pack)
        self._survey = lru_cache(maxsize=None)(self._look_through)
        self.total_packs = self._count_packs(epochs, max_steps)
        self.total_steps = math.ceil(self.total_packs / accumulation)

    def _deal(self, epoch: int) -> list[np.ndarray]:
        return epoch_windows(self._weights, self.seed, epoch)

    def _pack(self, epoch: int, window: int) -> list[Bin]:
        """The packs of a window of an epoch."""
        order = self._windows(epoch)[window]
        random = np.random.default_rng([self.seed, epoch, window])
        if len(self.documents) <= WINDOW_DOCUMENTS:
            return self._pack_order(self._tree, order, random)
        named, places = np.unique(order, return_inverse=True)
        tree = self._tree_of(named.tolist())
        packs = self._pack_order(tree, places, random)
        return [Bin(named[pack.documents].tolist(), pack.tokens) for pack in packs]

    def _pack_order(
        self, tree: PrefixTree, order: np.ndarray, random: np.random.Generator
    ) -> list[Bin]:
        capacity = self.micro_batch_tokens
        group_tokens = GROUP_TOKENS if self.share else 0  # without sharing nothing is in common
        return pack_window(tree, order.tolist(), capacity, random, group_tokens)

    @cached_property
    def _tree(self) -> PrefixTree:
        return self._tree_of(range(len(self.documents)))

    def _tree_of(self, documents: Sequence[int]) -> PrefixTree:
        if not self.share:
            return unshared(self._lengths[documents])
        texts = [self.documents[index].texts for index in documents]
        tree = prefix_tree([text for of in texts for text in of])
        return tree if len(tree.last) == len(texts) else tree.of_documents(numbered(texts))

    def _look_through(self, epoch: int) -> Survey:
        """Packs every window of an epoch once, to count."""
        found = Survey()
        for window in range(len(self._windows(epoch))):
            packs = self._packs_of(epoch, window)
            shown = [index for pack in packs for index in pack.documents]
            found.packs.append(len(packs))
            found.tokens += int(self._lengths[shown].sum())
            found.labels += int(self._labels[shown].sum())
            found.squares += int(self._squares[shown].sum())
            found.computed += sum(pack.tokens for pack in packs)
            found.largest = max(found.largest, *(pack.tokens for pack in packs))
            most = max(int(self._labels[pack.documents].sum()) for pack in packs)
            found.most_labels = max(found.most_labels, most)
        return found

    def _count_packs(self, epochs: float, max_steps: int | None) -> int:
        if max_steps is not None:
            return max_steps * self.accumulation
        whole = math.floor(epochs)
        packs = sum(sum(self._survey(epoch).packs) for epoch in range(whole))
        if epochs > whole:
            packs += math.ceil((epochs - whole) * sum(self._survey(whole).packs))
        return packs

    def steps(self, start_step: int = 0, rank: int = 0, ranks: int = 1) -> Iterator[list[Batch]]:
        """The packs of each step from `start_step` to the end of the run; of several ranks, those
        of one: pack i of a step is for rank i mod `ranks`."""
        packs = self._packs(start_step * self.accumulation)
        for step in range(start_step, self.total_steps):
            yield [self.collate(p) for p in list(islice(packs, self.size_of(step)))[rank::ranks]]

    def documents_of(self, step: int) -> list[list[Document]]:
        """The documents of each pack of the step after `step` finished ones."""
        return list(islice(self._packs(step * self.accumulation), self.size_of(step)))

    def size_of(self, step: int) -> int:
        """Packs of the step after `step` finished ones."""
        return min(self.accumulation, self.total_packs - step * self.accumulation)

    def _packs(self, skip: int) -> Iterator[list[Document]]:
        for epoch in count():
            for window in range(len(self._windows(epoch))):
                # What is skipped has been counted before, or is one step of a run by max_steps.
                packs = self._packs_of(epoch, window)
                for pack in packs[skip:]:
                    yield [self.documents[index] for index in pack.documents]
                skip = max(0, skip - len(packs))

    @property
    def first_packs(self) -> list[Bin]:
        """Of the first epoch, those of its first window, in order."""
        return self._packs_of(0, 0)

    @property
    def packs_per_epoch(self) -> int:
        return sum(self._survey(0).packs)

    @property
    def epoch_tokens(self) -> tuple[int, int, int]:
        """Of the first epoch: tokens as given, tokens that are computed, labels."""
        survey = self._survey(0)
        return survey.tokens, survey.computed, survey.labels

    @property
    def epoch_squares(self) -> int:
        """Sum of L^2 over the texts of the first epoch, L tokens: attention's work."""
        return self._survey(0).squares

    @property
    def largest_pack(self) -> tuple[int, int]:
        """(tokens, labels) that no pack exceeds; labels are those of the first epoch's packs and
        a tenth more, since other epochs are packed otherwise."""
        survey = self._survey(0)
        tokens = survey.largest
        if self.total_packs > sum(survey.packs):
            tokens = min(max(self.micro_batch_tokens, tokens), int(self._lengths.sum()))
        labels = survey.most_labels + survey.most_labels // 10
        return tokens, labels if self.share else min(tokens, labels)


@dataclass
class Survey:
    """What an epoch holds. packs: of each window. largest, most_labels: tokens and labels of a
    pack, at most."""

    packs: list[int] = field(default_factory=list)
    tokens: int = 0
    computed: int = 0
    labels: int = 0
    squares: int = 0
    largest: int = 0
    most_labels: int = 0
