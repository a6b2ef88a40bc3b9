"""Metrics against numbers worked out by hand."""

from __future__ import annotations

import pytest

from llamaweft.errors import UserError
from llamaweft.evaluate.bootstrap import summarise
from llamaweft.evaluate.curves import lower_is_better
from llamaweft.evaluate.metrics import (
    answer_metric,
    exact_match,
    f1,
    field_f1,
    json_valid,
    score_of,
)
from llamaweft.settings import ANSWERS, METRICS


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


def test_every_metric_a_recipe_may_name_is_there() -> None:
    for name in ANSWERS:
        metric = answer_metric(name)
        rows = [metric.row("a red lamp is on the table", "a red lamp is on a table")] * 2
        assert 0 <= summarise(rows, metric.score).value <= 1
    assert all(callable(score_of(name)) for name in METRICS)
    with pytest.raises(UserError, match="accuracy does not compare generated answers"):
        answer_metric("accuracy")


def test_the_direction_of_metrics() -> None:
    assert [name for name in METRICS if lower_is_better(name)] == ["loss", "perplexity", "mae"]
    assert not lower_is_better("my_package:loss")
