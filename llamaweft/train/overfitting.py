"""Overfitting, named when training and validation part: what is learnt no longer carries over."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from llamaweft.train.events import Event, StepEnded, Validated, WentBack

VALIDATIONS = 2
"""So many validations must lie above the best one, since one alone may be chance."""

LEAST_RISE = 0.01
"""And the last of them by so much of its loss."""


@dataclass(frozen=True)
class Overfitting:
    """The held-out loss at its best and now, and the training loss (its mean over the steps since
    the validation before) at the same two steps. In nats."""

    best_step: int
    step: int
    best_held_out: float
    held_out: float
    training_then: float
    training: float

    def __str__(self) -> str:
        return (
            f"overfitting: from step {self.best_step} to step {self.step} the held-out loss rose "
            f"from {self.best_held_out:.4g} to {self.held_out:.4g} while the training loss fell "
            f"from {self.training_then:.4g} to {self.training:.4g}"
        )


def find_overfitting(records: Iterable[dict[str, Any]]) -> Overfitting | None:
    """Whether a run overfits after its last validation.

    records: those of metrics.jsonl. None where the loss is not among the validated metrics.
    """
    losses: list[float] = []
    points: list[tuple[int, float, float]] = []  # step, held-out loss, training loss
    for record in records:
        loss = record.get("loss")
        if not isinstance(loss, int | float) or not math.isfinite(loss):
            continue
        if record["kind"] == "train":
            losses.append(loss)
        elif losses:
            points.append((record["step"], loss, fmean(losses)))
            losses = []
    if not points:
        return None
    best = min(points, key=lambda point: point[1])
    after = points[points.index(best) + 1 :]
    if len(after) < VALIDATIONS or after[-1][1] < best[1] * (1 + LEAST_RISE):
        return None
    if after[-1][2] >= best[2]:
        return None
    (best_step, best_held_out, then), (step, held_out, now) = best, after[-1]
    return Overfitting(best_step, step, best_held_out, held_out, then, now)


@dataclass
class OverfittingWatch:
    """A listener that says once that a run overfits. records: what it was before a resume."""

    say: Callable[[str], None]
    records: list[dict[str, Any]] = field(default_factory=list)
    found: Overfitting | None = None

    def __call__(self, event: Event) -> None:
        match event:
            case StepEnded():
                self.records.append({"kind": "train", "step": event.step, "loss": event.loss})
            case WentBack(to_step=step):
                self.records = [record for record in self.records if record["step"] <= step]
            case Validated(step=step, metrics=metrics):
                self.records.append({"kind": "validation", "step": step} | metrics)
                said = self.found is not None
                self.found = find_overfitting(self.records)
                if self.found is not None and not said:
                    self.say(str(self.found))
