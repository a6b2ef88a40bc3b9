"""The metric table in the terminal, with either side or none."""

from __future__ import annotations

import pytest

from llamaweft.cli.train import print_evaluation

SIDE = {"metrics": {"f1": {"value": 0.5, "low": 0.4, "high": 0.6, "count": 9}}}


@pytest.mark.parametrize(("before", "after"), [(SIDE, SIDE), (SIDE, None), (None, SIDE)])
def test_a_side_that_was_not_measured_is_left_open(before, after, capsys) -> None:
    """The demo measures a random split only after training."""
    print_evaluation({"name": "a random split", "before": before, "after": after})
    said = capsys.readouterr().out
    assert "On a random split" in said
    assert "50.0% [40.0%, 60.0%]" in said


def test_no_metric_is_no_table(capsys) -> None:
    print_evaluation({"name": "rows", "before": {"metrics": {}}, "after": {"metrics": {}}})
    assert capsys.readouterr().out == ""
