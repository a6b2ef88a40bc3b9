"""What a run tells the world, and how the world asks it to stop.

metrics.jsonl, progress bars and trackers listen; the loop knows none of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path


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
class Ended:
    """The loop is over. reason: finished, early_stopping, or what a stop request said."""

    step: int
    reason: str


Event = Started | StepEnded | Validated | CheckpointSaved | Ended
Listener = Callable[[Event], None]


@dataclass
class StopRequest:
    """Asked from outside (Ctrl-C, a page): the loop ends after the current step and saves."""

    reason: str | None = None

    def __call__(self, reason: str) -> None:
        self.reason = reason


@dataclass
class Announcer:
    """Passes each event to every listener, in order."""

    listeners: list[Listener] = field(default_factory=list)

    def __call__(self, event: Event) -> None:
        for listener in self.listeners:
            listener(event)
