"""Metrics of tasks with a head, as statistics that add up over rows (bootstrap.py).

scikit-learn's definitions: `accuracy_score`, `f1_score` with average macro and micro,
`mean_absolute_error`; the correlation is Pearson's.

D: draws. S: statistics of a row. C: classes.
"""

from __future__ import annotations

import numpy as np

from llamaweft.evaluate.bootstrap import Parts, Score, ratio

OUTSIDE = "O"
"""The tag of words that belong to nothing; F1 leaves it out, as seqeval and CoNLL do."""

ROUNDING = 1e-12
"""Share of a sum of squares below which what is left of it is rounding."""


def accuracy(said: np.ndarray, expected: np.ndarray, many: bool) -> Parts:
    """Right ones and all of a row. many: a row is right when all its classes are."""
    if many:
        return float(set(said.tolist()) == set(expected.tolist())), 1.0
    return float((said == expected).sum()), float(len(expected))


def counted(said: np.ndarray, expected: np.ndarray, classes: int, many: bool) -> Parts:
    """For each class: right ones, said, expected; all of the first, then of the second and third.
    many: said and expected are the classes of one text, and not of one word after another."""
    same = np.intersect1d(said, expected) if many else expected[said == expected]
    right = np.bincount(same, minlength=classes)
    each = [right, np.bincount(said, minlength=classes), np.bincount(expected, minlength=classes)]
    return np.concatenate(each).astype(float).tolist()


def macro_f1(sums_DS: np.ndarray) -> np.ndarray:
    """The mean of the F1 of classes that were said or expected."""
    right_DC, said_DC, expected_DC = np.split(sums_DS, 3, axis=1)
    both_DC = said_DC + expected_DC
    f1_DC = 2 * right_DC / np.maximum(both_DC, 1)
    return f1_DC.sum(1) / np.maximum((both_DC > 0).sum(1), 1)


def micro_f1(sums_DS: np.ndarray) -> np.ndarray:
    """F1 of all labels together."""
    right_D, said_D, expected_D = (part.sum(1) for part in np.split(sums_DS, 3, axis=1))
    return 2 * right_D / np.maximum(said_D + expected_D, 1)


def moments(said: float, expected: float) -> Parts:
    """What a correlation is computed from."""
    return 1.0, said, expected, said * said, expected * expected, said * expected


def pearson(sums_DS: np.ndarray) -> np.ndarray:
    """Pearson's correlation; 0 where one side does not vary."""
    n_D, x_D, y_D, xx_D, yy_D, xy_D = sums_DS.T
    covariance_D = n_D * xy_D - x_D * y_D
    x_spread_D, y_spread_D = n_D * xx_D - x_D**2, n_D * yy_D - y_D**2
    varies_D = (x_spread_D > ROUNDING * n_D * xx_D) & (y_spread_D > ROUNDING * n_D * yy_D)
    spread_D = np.where(varies_D, x_spread_D * y_spread_D, 1.0)
    return np.where(varies_D, covariance_D / np.sqrt(spread_D), 0.0)


HEAD_SCORES: dict[str, Score] = {
    "accuracy": ratio,
    "macro_f1": macro_f1,
    "micro_f1": micro_f1,
    "mae": ratio,
    "pearson": pearson,
}
