"""Intervals and the paired test: rows are drawn with replacement, and the metric is computed again.

R: held-out rows. S: statistics that a row adds to a metric. D: draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Parts = Sequence[float]
"""What a row adds to a metric: numerator and denominator of a ratio, or the statistics that a score
of all rows together is computed from. The sum over rows says all that the metric depends on."""

Score = Callable[[np.ndarray], np.ndarray]
"""Sums over rows, sums_DS -> the metric of each draw, value_D."""

RESAMPLES = 2000
FEWEST_ROWS = 6
"""Rows below which nothing is called a difference: an exact sign test of 5 rows that all changed
the same way has p = 2 / 2^5 > 0.05, and the bootstrap would not see that."""

BETTER, WORSE, NOT_SHOWN = "better", "worse", "no difference shown"


@dataclass(frozen=True)
class Value:
    """A metric on held-out rows. low, high: 95% percentile bootstrap over rows. count: rows."""

    value: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Difference:
    """after - before, in the metric's unit. low, high: 95% paired percentile bootstrap over rows.
    verdict: better, worse or no difference shown."""

    value: float
    low: float
    high: float
    verdict: str


def ratio(sums_DS: np.ndarray) -> np.ndarray:
    """sum(numerators) / sum(denominators)."""
    return sums_DS[:, 0] / np.maximum(sums_DS[:, 1], 1e-12)


def summarise(parts: Sequence[Parts], score: Score = ratio) -> Value:
    """The metric of all rows with its bootstrap interval (Efron, 1979). The seed is fixed."""
    rows_RS = np.asarray(parts, dtype=np.float64)
    low, high = np.percentile(score(_draw(len(rows_RS)) @ rows_RS), [2.5, 97.5])
    return Value(_of_all(rows_RS, score), float(low), float(high), len(rows_RS))


def compare(
    before: Sequence[Parts], after: Sequence[Parts], score: Score, *, lower_is_better: bool
) -> Difference:
    """The paired test: each draw takes the same rows on both sides (Koehn, 2004), so that how hard
    a row is cancels out.

    The verdict is better or worse where the interval of the difference is without 0 and there are
    at least FEWEST_ROWS rows. Raises ValueError where the sides have not the same number of rows.
    """
    if len(before) != len(after):
        raise ValueError(f"{len(before)} rows before and {len(after)} after are no pairs")
    old_RS, new_RS = (np.asarray(side, dtype=np.float64) for side in (before, after))
    counts_DR = _draw(len(old_RS))
    differences_D = score(counts_DR @ new_RS) - score(counts_DR @ old_RS)
    low, high = (float(bound) for bound in np.percentile(differences_D, [2.5, 97.5]))
    value = _of_all(new_RS, score) - _of_all(old_RS, score)
    if len(old_RS) < FEWEST_ROWS or not (low > 0 or high < 0):
        return Difference(value, low, high, NOT_SHOWN)
    return Difference(value, low, high, BETTER if (high < 0) == lower_is_better else WORSE)


def _draw(rows: int) -> np.ndarray:
    """counts_DR: how often each draw takes each row; the same for every metric and side."""
    return np.random.default_rng(0).multinomial(rows, np.full(rows, 1 / rows), size=RESAMPLES)


def _of_all(rows_RS: np.ndarray, score: Score) -> float:
    sums_S = np.array([column_R.sum() for column_R in rows_RS.T])
    return float(score(sums_S[None])[0])
