"""What was expected against what was said, as a picture: a table whose cells are shaded by their
share of a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MOST_CLASSES = 30
"""More of them are not readable; the rarest are left out then."""


@dataclass(frozen=True)
class Cell:
    """count: rows. share: of the rows with that class, 0 to 1. right: said what was expected."""

    count: int
    share: float
    right: bool


@dataclass(frozen=True)
class ConfusionMatrix:
    """labels: of the classes, rows and columns alike. rows: a cell for each. left_out: classes that
    are not shown."""

    labels: list[str]
    rows: list[list[Cell]]
    left_out: int


def confusion_matrix(content: dict[str, Any] | None) -> ConfusionMatrix | None:
    """From an evaluation's {"labels", "counts": expected by said}; None where there is none."""
    if not content:
        return None
    labels, counts = content["labels"], content["counts"]
    totals = [sum(row) for row in counts]
    seen = [i for i in range(len(labels)) if totals[i] or any(row[i] for row in counts)]
    kept = sorted(sorted(seen, key=lambda i: -totals[i])[:MOST_CLASSES])
    rows = [
        [Cell(counts[i][j], counts[i][j] / max(1, totals[i]), i == j) for j in kept] for i in kept
    ]
    return ConfusionMatrix([str(labels[i]) for i in kept], rows, len(seen) - len(kept))
