"""What a run tells the world, and how the world asks it to stop.

metrics.jsonl, progress bars and trackers listen; the loop knows none of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Started:
    """The loop begins (again) after `step` finished steps of `total_steps`."""

    step: int
    total_steps: int


@dataclass(frozen=True)
class StepEnded:
    """One optimizer step. Global values; nothing is cumulative.

    loss: mean over the step's trained tokens, in nats. lr: learning rate of the step.
    grad_norm: before clipping; not finite where fp16 overflowed and the weights stayed.
    skipped: whether the guard left the step out; loss and gradient are then what they are.
    tokens: of the documents as given. computed_tokens: of the packs.
    seconds: wall clock with data loading, without validation and checkpoints.
    useful_flops_per_second: base matmuls that were needed, over seconds.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    computed_tokens: int
    trained_tokens: int
    seconds: float
    tokens_per_second: float
    useful_flops_per_second: float
    anon_bytes: int
    rss_bytes: int
    device_bytes: int
    skipped: bool = False


@dataclass(frozen=True)
class Validated:
    """Held-out metrics after `step` steps; `best` where they are the best so far."""

    step: int
    metrics: dict[str, float]
    best: bool


@dataclass(frozen=True)
class CheckpointSaved:
    step: int
    folder: Path


@dataclass(frozen=True)
class StepLeftOut:
    """The guard left a step out. documents: those that do harm by themselves, or, where none does,
    all of the step."""

    step: int
    reason: str
    documents: list[Any]


@dataclass(frozen=True)
class WentBack:
    """After `step` the loop went back to the checkpoint of `to_step`; the learning rate is
    multiplied by `learning_rate_factor` from there on."""

    step: int
    to_step: int
    learning_rate_factor: float


@dataclass(frozen=True)
class PacksSplit:
    """In the step after `step` memory ran out: packs of more than `over_tokens` are computed in
    parts from there on."""

    step: int
    over_tokens: int
    reason: str


@dataclass(frozen=True)
class RankLags:
    """A rank kept the others waiting for several steps, `step` the last of them: it took so many
    times as long as the middle one."""

    step: int
    rank: int
    times: float


@dataclass(frozen=True)
class Ended:
    """The loop is over. reason: finished, early_stopping, or what a stop request said."""

    step: int
    reason: str


Event = (
    Started
    | StepEnded
    | Validated
    | CheckpointSaved
    | StepLeftOut
    | WentBack
    | PacksSplit
    | RankLags
    | Ended
)
Listener = Callable[[Event], None]


class InterruptedByRequest(Exception):  # noqa: N818 - no error
    """A stop request cut short what was being measured. Its text is the request's reason."""


@dataclass
class StopRequest:
    """Asked from outside (Ctrl-C, a page): the loop ends after the current pack and saves.

    of_all: whether other processes must hear of it first, so that none of them waits in vain; the
    loop tells them after a step, and nothing is cut short before.
    """

    reason: str | None = None
    of_all: bool = False

    def __call__(self, reason: str) -> None:
        self.reason = reason

    def check(self) -> None:
        """Raises InterruptedByRequest once a stop was asked for."""
        if self.reason is not None and not self.of_all:
            raise InterruptedByRequest(self.reason)


@dataclass
class Announcer:
    """Passes each event to every listener, in order."""

    listeners: list[Listener] = field(default_factory=list)

    def __call__(self, event: Event) -> None:
        for listener in self.listeners:
            listener(event)
