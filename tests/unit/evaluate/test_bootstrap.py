"""Intervals and the paired test against known variances and worked-out cases."""

from __future__ import annotations

import numpy as np
import pytest

from llamaweft.evaluate.bootstrap import BETTER, NOT_SHOWN, WORSE, compare, ratio, summarise
from llamaweft.evaluate.metrics import perplexity


def test_a_ratio_is_summed_before_it_is_divided() -> None:
    value = summarise([(1.0, 1.0), (0.0, 3.0)])
    assert value.value == 0.25
    assert value.low <= 0.25 <= value.high
    assert value.count == 2


def test_the_interval_is_that_of_the_bootstrap() -> None:
    # For a share p of n rows the normal approximation gives p +- 1.96 sqrt(p (1 - p) / n).
    value = summarise([(1.0, 1.0)] * 300 + [(0.0, 1.0)] * 100)
    half = 1.96 * (0.75 * 0.25 / 400) ** 0.5
    assert (value.low, value.high) == pytest.approx((0.75 - half, 0.75 + half), abs=0.006)
    assert summarise([(np.log(4), 1.0)] * 5, perplexity).value == pytest.approx(4)


def pairs(shift: float, noise: float, rows: int = 200) -> tuple[list, list]:
    """Rows that differ much from each other, and by `shift` +- `noise` from before to after."""
    random = np.random.default_rng(1)
    old = random.normal(10, 5, rows)
    new = old + shift + random.normal(0, noise, rows)
    return [[value, 1.0] for value in old], [[value, 1.0] for value in new]


def test_pairs_show_what_two_intervals_do_not() -> None:
    old, new = pairs(0.3, 0.5)
    found = compare(old, new, ratio, lower_is_better=False)
    assert found.verdict == BETTER
    assert summarise(old).high > summarise(new).low  # the two intervals overlap
    # The interval is that of the rows' differences: mean +- 1.96 deviations / sqrt(rows).
    each = np.subtract([row[0] for row in new], [row[0] for row in old])
    half = 1.96 * each.std() / len(each) ** 0.5
    assert found.value == pytest.approx(each.mean())
    assert (found.low, found.high) == pytest.approx(
        (each.mean() - half, each.mean() + half), abs=0.1 * half
    )


@pytest.mark.parametrize(
    ("shift", "lower_is_better", "verdict"),
    [(0.3, False, BETTER), (0.3, True, WORSE), (-0.3, False, WORSE), (-0.3, True, BETTER)],
)
def test_the_verdict_knows_the_metrics_direction(shift, lower_is_better, verdict) -> None:
    for score in (ratio, perplexity):
        found = compare(*pairs(shift, 0.5), score, lower_is_better=lower_is_better)
        assert found.verdict == verdict
        assert (found.low > 0) == (shift > 0)


def test_no_difference_is_shown_where_the_interval_has_0() -> None:
    found = compare(*pairs(0.0, 0.5), ratio, lower_is_better=False)
    assert found.low < 0 < found.high
    assert found.verdict == NOT_SHOWN
    same = pairs(0.0, 0.0)[0]
    assert compare(same, same, ratio, lower_is_better=False).verdict == NOT_SHOWN


def test_there_is_hardly_ever_a_difference_where_there_is_none() -> None:
    """The test's level: of 300 comparisons of equals about 5% show a difference."""
    random = np.random.default_rng(3)
    verdicts = []
    for _ in range(300):
        old, new = (random.binomial(1, 0.4, (100, 1)).astype(float) for _ in range(2))
        ones = np.ones((100, 1))
        sides = [np.hstack([side, ones]).tolist() for side in (old, new)]
        verdicts.append(compare(*sides, ratio, lower_is_better=False).verdict)
    assert 0.01 < 1 - verdicts.count(NOT_SHOWN) / 300 < 0.09


def test_a_handful_of_rows_shows_nothing() -> None:
    for rows, verdict in ((5, NOT_SHOWN), (6, BETTER)):
        wrong, right = [[0.0, 1.0]] * rows, [[1.0, 1.0]] * rows
        assert compare(wrong, right, ratio, lower_is_better=False).verdict == verdict


def test_what_is_no_number_shows_nothing() -> None:
    old, new = pairs(0.3, 0.5)
    new[0] = [float("nan"), 1.0]
    assert compare(old, new, ratio, lower_is_better=False).verdict == NOT_SHOWN


def test_sides_of_different_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="2 rows before and 1 after"):
        compare([[1.0, 1.0]] * 2, [[1.0, 1.0]], ratio, lower_is_better=False)
