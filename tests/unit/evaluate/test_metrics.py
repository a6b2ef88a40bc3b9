"""Metrics against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from llamaweft.evaluate.metrics import exact_match, f1, field_f1, json_valid, summarise


@pytest.mark.parametrize(
    ("answer", "reference", "equal"),
    [
        ("yes ", "yes", 1),
        ("Yes", "yes", 0),
        ('{"b": [1], "a": 2}', '{"a": 2, "b": [1]}', 1),
        ('{"a": 2.0}', '{"a": 2}', 1),
        ('{"a": true}', '{"a": 1}', 0),
        ('{"a": 2} and more', '{"a": 2}', 0),
        ('{"a": 2', '{"a": 2}', 0),
    ],
)
def test_exact_match(answer: str, reference: str, equal: float) -> None:
    assert exact_match(answer, reference) == (equal, 1)


def test_f1_is_squads() -> None:
    # Without articles and punctuation: {cat, sat} against {cat, sat, down}: 2 * 2 / 5.
    assert f1("The cat sat.", "a cat sat down!") == (pytest.approx(0.8), 1)
    assert f1("", "x") == (0, 1)
    assert f1("the", "a") == (1, 1)


def test_field_f1_counts_leaves_by_path() -> None:
    reference = '{"intent": "On", "slots": {"area": "den", "level": 3}}'
    answer = '{"intent": "On", "slots": {"area": "hall", "level": 3, "x": 1}}'
    assert field_f1(answer, reference) == (4, 7)  # two right of four said and three wanted
    assert field_f1("no json", reference) == (0, 3)
    assert field_f1(reference, reference) == (6, 6)


def test_json_valid() -> None:
    assert json_valid("[1]", "") == (1, 1)
    assert json_valid("3", "") == (0, 1)


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
    assert summarise([(np.log(4), 1.0)] * 5, np.exp).value == pytest.approx(4)
