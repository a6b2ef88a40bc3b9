"""Overfitting is named where training and validation part, and only there."""

from __future__ import annotations

import pytest

from llamaweft.train.events import StepEnded, Validated
from llamaweft.train.overfitting import OverfittingWatch, find_overfitting


def records(pairs: list[tuple[float, float]]) -> list[dict]:
    """Ten steps with a training loss, then a validation, again and again."""
    made: list[dict] = []
    for index, (training, held_out) in enumerate(pairs):
        made += [{"kind": "train", "step": 10 * index + i, "loss": training} for i in range(1, 11)]
        made.append({"kind": "validation", "step": 10 * index + 10, "loss": held_out})
    return made


def test_it_names_the_best_step_and_what_both_losses_did() -> None:
    found = find_overfitting(records([(2.0, 2.1), (1.5, 1.8), (1.0, 1.9), (0.5, 2.2)]))
    assert found is not None
    assert (found.best_step, found.step) == (20, 40)
    assert str(found) == (
        "overfitting: from step 20 to step 40 the held-out loss rose from 1.8 to 2.2 while the "
        "training loss fell from 1.5 to 0.5"
    )


@pytest.mark.parametrize(
    "pairs",
    [
        [(2.0, 2.1), (1.5, 1.8), (1.0, 1.7)],  # both fall
        [(2.0, 2.1), (1.5, 1.8), (1.0, 2.5)],  # one validation may be chance
        [(2.0, 2.1), (1.5, 1.8), (1.4, 1.81), (1.3, 1.805)],  # a rise too small to mean much
        [(2.0, 2.1), (1.5, 1.8), (1.9, 2.0), (2.5, 2.8)],  # both rise: it diverges
        [],
    ],
)
def test_it_is_not_named_without_need(pairs: list[tuple[float, float]]) -> None:
    assert find_overfitting(records(pairs)) is None


def test_validations_without_a_loss_say_nothing() -> None:
    with_accuracy = [
        r | {"loss": None, "accuracy": 0.5} if r["kind"] == "validation" else r
        for r in records([(2.0, 1.0), (1.0, 2.0), (0.5, 3.0)])
    ]
    assert find_overfitting(with_accuracy) is None


def test_the_watch_says_it_once_and_knows_what_was_before_a_resume() -> None:
    said: list[str] = []
    watch = OverfittingWatch(said.append, records([(2.0, 1.0), (1.5, 2.0)]))
    for training, held_out, step in ((1.0, 2.1, 30), (0.8, 2.2, 40)):
        watch(StepEnded(step, training, 0.1, 1.0, 1, 1, 1, 1.0, 1.0, 1.0, 0, 0, 0))
        watch(Validated(step, {"loss": held_out}, best=False))
    (line,) = said
    assert "from step 10 to step 30" in line
    assert watch.found is not None
    assert watch.found.step == 40
