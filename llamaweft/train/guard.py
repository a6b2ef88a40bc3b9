"""The guard: a step that would harm the model is found before it is taken, and left out.

Harm is a loss or a gradient that is no finite number, and, where the recipe asks for it, a loss far
above its running mean. Deciding needs numbers alone; the loop acts on them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

SMOOTHING = 0.98
"""Weight of the past in the running mean and variance of the loss."""

WARM_UP_STEPS = 20
"""Steps before a loss can be called a spike."""


@dataclass(frozen=True)
class GuardSettings:
    """max_skipped_steps: steps left out in a row before the loop goes back to its last good
    checkpoint, or, without goes_back, ends. learning_rate_factor: what every return multiplies the
    rate by; max_returns: how many there may be. loss_spike: standard deviations above its mean at
    which a loss counts as harm; None: never."""

    max_skipped_steps: int = 3
    goes_back: bool = False
    learning_rate_factor: float = 0.5
    max_returns: int = 3
    loss_spike: float | None = None


@dataclass
class GuardState:
    """What the guard carries from step to step; a part of every checkpoint.

    records: lines of quarantine.jsonl. mean_loss, variance: running, over `losses` steps taken.
    split_over_tokens: packs of more tokens are computed in parts, since one of them was too large
    for the memory.
    """

    skipped_in_a_row: int = 0
    returns: int = 0
    learning_rate_factor: float = 1.0
    records: int = 0
    mean_loss: float = 0.0
    variance: float = 0.0
    losses: int = 0
    split_over_tokens: int | None = None

    def taken(self, loss: float) -> None:
        """Remember a step that was taken, with its loss."""
        self.skipped_in_a_row = 0
        past = SMOOTHING if self.losses else 0.0
        apart = loss - self.mean_loss if self.losses else 0.0
        self.mean_loss = past * self.mean_loss + (1 - past) * loss
        self.variance = past * (self.variance + (1 - past) * apart**2)
        self.losses += 1

    def highest_loss(self, settings: GuardSettings) -> float:
        """What a loss may be, at most; infinite where no spikes are looked for, or not yet."""
        if settings.loss_spike is None or self.losses < WARM_UP_STEPS:
            return math.inf
        return self.mean_loss + settings.loss_spike * math.sqrt(self.variance)

    def returned(self, settings: GuardSettings, then: GuardState) -> GuardState:
        """The state after going back to a checkpoint, whose own was `then`."""
        return replace(
            then,
            skipped_in_a_row=0,
            returns=self.returns + 1,
            learning_rate_factor=self.learning_rate_factor * settings.learning_rate_factor,
            records=self.records,
            split_over_tokens=self.split_over_tokens,
        )


class HarmError(Exception):
    """Why a step may not be taken. weights_changed: whether a part of it was (the optimizer in the
    backward pass), so that the weights are no longer good."""

    def __init__(self, reason: str, loss: float, *, weights_changed: bool = False) -> None:
        super().__init__(reason)
        self.loss, self.weights_changed = loss, weights_changed


class OverBudgetError(MemoryError):
    """A micro-batch took more memory than the recipe's budget."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator failed: CUDA's, torch's on a CPU, Python's, or the budget."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def split(documents: Sequence[Any], tokens: int) -> list[list[Any]]:
    """The documents in order, in parts of at most so many tokens; a longer one is alone."""
    parts: list[list[Any]] = []
    held = 0
    for document in documents:
        if not parts or held + len(document.ids) > tokens:
            parts.append([])
            held = 0
        parts[-1].append(document)
        held += len(document.ids)
    return parts


def culprits(documents: Sequence[Any], harms: Callable[[Any], bool]) -> list[Any]:
    """The documents that do harm by themselves; all of them where none does."""
    return [document for document in documents if harms(document)] or list(documents)
