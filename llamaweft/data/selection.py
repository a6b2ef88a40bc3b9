"""Which rows, and which part of each: documents that are read from the disk when asked for."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar, overload

import numpy as np

from llamaweft.data.chat import Document
from llamaweft.data.example import Example
from llamaweft.data.store import StoredRows, text_tokens

Item = TypeVar("Item")


class _OfRows(Sequence[Item]):
    """Items made of stored rows when they are asked for. rows_N: the row of each."""

    rows_N: np.ndarray

    def __len__(self) -> int:
        return len(self.rows_N)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        if isinstance(index, slice):
            return [self._at(i) for i in range(*index.indices(len(self)))]
        return self._at(index)

    @abstractmethod
    def _at(self, index: int) -> Item: ...


@dataclass(frozen=True, eq=False)
class Documents(_OfRows[Document]):
    """Parts of stored rows, as documents. rows_N, starts_N, stops_N: token [start, stop) of a row.
    labels_N: trained tokens of each. classes_C: the head's class for each of the store's, and what
    one counts (class_weights_C); None: targets are what they are."""

    stored: StoredRows
    rows_N: np.ndarray
    starts_N: np.ndarray
    stops_N: np.ndarray
    labels_N: np.ndarray
    classes_C: np.ndarray | None = None
    class_weights_C: np.ndarray | None = None

    @property
    def lengths(self) -> np.ndarray:
        return self.stops_N - self.starts_N

    @property
    def seconds(self) -> np.ndarray:
        """Where the second text of each begins; 0 where there is one."""
        return self.stored.table["second"][self.rows_N].astype(np.int64)

    @property
    def examples(self) -> Examples:
        """The row of each document, beside it."""
        return Examples(self.stored, self.rows_N)

    def _at(self, index: int) -> Document:
        row, start, stop = (int(a[index]) for a in (self.rows_N, self.starts_N, self.stops_N))
        document = self.stored.document(row, start, stop)
        if document.labels is not None and self.classes_C is not None:
            given = document.labels["target"].astype(np.int64)
            document.labels["target"] = np.where(given < 0, given, self.classes_C[given])
            if self.class_weights_C is not None:
                weights = self.class_weights_C[self.classes_C[given]]
                document.labels["weight"] *= np.where(given < 0, 1, weights)
        return document


@dataclass(frozen=True, eq=False)
class Examples(_OfRows[Example]):
    """Stored rows as they were given."""

    stored: StoredRows
    rows_N: np.ndarray

    def _at(self, index: int) -> Example:
        return self.stored.example(int(self.rows_N[index]))


def lengths_of(documents: Sequence[Document]) -> np.ndarray:
    """Tokens of each."""
    if isinstance(documents, Documents):
        return documents.lengths
    return np.array([len(document.ids) for document in documents], np.int64)


def labels_of(documents: Sequence[Document]) -> np.ndarray:
    """Trained tokens of each."""
    if isinstance(documents, Documents):
        return documents.labels_N
    return np.array([document.trained_tokens for document in documents], np.int64)


def squares_of(documents: Sequence[Document]) -> np.ndarray:
    """Sum of L^2 over the texts of each, L tokens: attention's work."""
    if isinstance(documents, Documents):
        seconds = documents.seconds
    else:
        seconds = np.array([document.second for document in documents], np.int64)
    return seconds**2 + (lengths_of(documents).astype(np.int64) - seconds) ** 2


def pieces(
    tokens: int, max_length_tokens: int, policy: str | None, longest: int | None = None
) -> list[tuple[int, int]]:
    """`data.on_too_long` applied to a document, as parts [start, stop) of it.

    split: consecutive parts. drop: none. truncate: the end is cut. None: kept as it is, for the
    audit to block. longest: tokens of the longer text of a pair, which is never cut.
    """
    if (longest or tokens) <= max_length_tokens or policy is None:
        return [(0, tokens)]
    if policy == "drop":
        return []
    end = max_length_tokens if policy == "truncate" else tokens
    starts = range(0, end, max_length_tokens)
    return [(start, min(start + max_length_tokens, end)) for start in starts]


def fitted(
    stored: StoredRows, rows_N: np.ndarray, max_length_tokens: int, policy: str | None
) -> Documents:
    """The documents of these rows that have a trained token, fitted to the greatest length."""
    tokens_N = stored.table["tokens"][rows_N].astype(np.int64)
    labels_N = stored.table["trained"][rows_N].astype(np.int64)
    longest_N = text_tokens(stored.table[rows_N])
    kept = (labels_N > 0) & ((longest_N <= max_length_tokens) | (policy is None))
    whole = np.stack([rows_N, np.zeros_like(tokens_N), tokens_N, labels_N])[:, kept]
    cut = [
        (row, start, stop, labels)
        for row in rows_N[~kept].tolist()
        for start, stop in pieces(int(stored.table["tokens"][row]), max_length_tokens, policy)
        if (labels := stored.trained(row, start, stop))
    ]
    if not cut:
        return Documents(stored, *whole)
    found = np.concatenate([whole, np.array(cut, np.int64).T], axis=1)
    return Documents(stored, *found[:, np.lexsort(found[1::-1])])  # by row, then by start
