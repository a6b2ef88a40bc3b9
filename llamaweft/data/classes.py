"""The classes of a task: those of the training rows, in the order in which a head has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from llamaweft.data.chat import Document
from llamaweft.data.store import StoredRows
from llamaweft.data.targets import NO_CLASS, REWARD, class_name, ordered
from llamaweft.errors import UserError


@dataclass(frozen=True)
class Classes:
    """labels: as they were given, as JSON, by class. counts_C: labels of the training rows that
    each has. many: whether several may hold for one text."""

    labels: tuple[str, ...]
    counts_C: np.ndarray
    many: bool = False

    @property
    def names(self) -> list[str]:
        return [class_name(label) for label in self.labels]

    def of_store(self, stored: StoredRows) -> np.ndarray:
        """The class of each label of a store; -1 for one that no training row has."""
        return self._classes_of(stored.state["classes"])

    def _classes_of(self, labels: Sequence[str]) -> np.ndarray:
        places = {label: place for place, label in enumerate(self.labels)}
        return np.array([places.get(label, -1) for label in labels], np.int64)

    def named(self, document: Document, labels: Sequence[str]) -> Document:
        """A document with these classes, whose targets are places in `labels`. Raises UserError,
        naming the row, for a label that no training row has."""
        assert document.labels is not None
        given = document.labels["target"].astype(np.int64)
        classes = np.append(self._classes_of(labels), NO_CLASS)  # the last stands for no class
        unknown = given[(given >= 0) & (classes[given] < 0)]
        if len(unknown):
            raise self._unknown(document.where, labels[int(unknown[0])])
        found = document.labels.copy()
        found["target"] = classes[given]
        return replace(document, labels=found)

    def check_many(self, many: bool, where: str) -> None:
        """Raises UserError where a row gives a list of classes, and the training rows one each, or
        the other way round."""
        if many != self.many:
            one, several = ("several", "one") if many else ("one", "several")
            raise UserError(
                f"{where} gives {one} of its classes and the training rows {several}; write a list "
                "in every row, or in none"
            )

    @staticmethod
    def _unknown(where: str, label: str) -> UserError:
        return UserError(
            f"{where} has the label {class_name(label)!r}, which no training row has; add rows of "
            "it, or take it out of the rows that are measured on"
        )

    def check_held_out(self, held: StoredRows, held_N: np.ndarray) -> None:
        """Raises UserError, naming the row, for a label that no training row has, and where one
        side gives lists of classes and the other does not."""
        if len(held_N) and held.state.get("many") is not None:
            self.check_many(held.state["many"], held.where(int(held_N[0])))
        of_store = self.of_store(held)
        if (of_store >= 0).all():
            return
        for row in held_N.tolist():
            labels = held.document(row).labels
            assert labels is not None
            for label in labels["target"].astype(np.int64).tolist():
                if label >= 0 and of_store[label] < 0:
                    raise self._unknown(held.where(row), held.state["classes"][label])

    def weights(self, given: str | dict[str, float] | None) -> np.ndarray | None:
        """What a label of each class counts: `balanced` (the same in all for each class), or as
        given by its name. Raises UserError for a name that is no class."""
        if given is None:
            return None
        if isinstance(given, str):
            return (self.counts_C.sum() / (len(self.labels) * self.counts_C)).astype(np.float32)
        unknown = sorted(given.keys() - set(self.names))
        if unknown:
            raise UserError(
                f"head.class_weights: {unknown[0]!r} is no class; known are {', '.join(self.names)}"
            )
        return np.array([given.get(name, 1.0) for name in self.names], np.float32)


def label_names(document: Document, task: str, classes: Classes | None) -> list[str]:
    """What a head should say of a document, as a person reads it."""
    assert document.labels is not None
    targets = document.labels["target"].tolist()
    if task == "question_answering":
        return [("begins", "ends")[int(target)] for target in targets]
    if task == REWARD:
        return ["chosen" if target > 0 else "rejected" for target in targets]
    if classes is None:
        return [f"{target:g}" for target in targets]
    return [classes.names[int(t)] if t >= 0 else "no class" for t in targets]


def rare_rows(stored: StoredRows, rows_N: np.ndarray) -> np.ndarray:
    """Rows with a class that no other of these rows has."""
    seen = stored.state.get("classes", [])
    if not seen or not len(rows_N):
        return np.zeros(0, np.int64)
    counts = stored.table["trained"][rows_N].astype(np.int64)
    of_label, targets = np.repeat(rows_N, counts), stored.targets(rows_N).astype(np.int64)
    pairs = np.unique(np.stack([targets, of_label]), axis=1)  # a class counts once a row
    classes, rows_of = np.unique(pairs[0], return_counts=True)
    alone = classes[(rows_of == 1) & (classes >= 0)]
    return np.unique(pairs[1][np.isin(pairs[0], alone)])


def find_classes(stored: StoredRows, rows_N: np.ndarray) -> Classes | None:
    """The classes of these rows; None for a task without any. Raises UserError where no row has
    one, and for two that read alike."""
    seen: Sequence[str] = stored.state.get("classes", [])
    if not seen and stored.state.get("many") is None:
        return None
    counts_C = np.zeros(len(seen), np.int64)
    targets = stored.targets(rows_N).astype(np.int64)
    found, counts = np.unique(targets[targets >= 0], return_counts=True)
    counts_C[found] = counts
    labels = ordered([label for label, count in zip(seen, counts_C, strict=True) if count])
    places = {label: place for place, label in enumerate(seen)}
    order = [places[label] for label in labels]
    if not labels and len(rows_N):
        raise UserError("no training row has a class; give at least one row a label")
    for one, other in pairwise(sorted(labels, key=class_name)):
        if class_name(one) == class_name(other):
            raise UserError(
                f"data.train gives the label {class_name(one)!r} as text and as a number or "
                "true/false; write it alike in every row"
            )
    return Classes(tuple(labels), counts_C[order], bool(stored.state.get("many")))
