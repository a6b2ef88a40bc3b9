"""The guard's decisions, in numbers alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from llamaweft.train.guard import (
    WARM_UP_STEPS,
    GuardSettings,
    GuardState,
    OverBudgetError,
    culprits,
    is_out_of_memory,
    split,
)

SPIKES = GuardSettings(loss_spike=4.0)


@dataclass
class Tokens:
    ids: range


def test_no_loss_is_a_spike_without_the_setting_or_before_the_warm_up() -> None:
    state = GuardState()
    for _ in range(WARM_UP_STEPS - 1):
        state.taken(2.0)
    assert state.highest_loss(SPIKES) == math.inf
    state.taken(2.0)
    assert state.highest_loss(SPIKES) < math.inf
    assert state.highest_loss(GuardSettings()) == math.inf


def test_the_limit_follows_the_running_mean_and_deviation() -> None:
    """Of losses drawn with mean 3 and deviation 0.5, four deviations above the mean are 5."""
    random, state = np.random.default_rng(0), GuardState()
    limits = []
    for step in range(3000):
        state.taken(random.normal(3.0, 0.5))
        if step > 1000:
            limits.append(state.highest_loss(SPIKES))
    assert np.mean(limits) == pytest.approx(5.0, abs=0.15)


def test_a_step_that_is_taken_ends_the_row() -> None:
    state = GuardState(skipped_in_a_row=2)
    state.taken(1.0)
    assert state.skipped_in_a_row == 0


def test_going_back_lowers_the_rate_and_keeps_what_happened() -> None:
    """The running mean is the checkpoint's; what was written, and how packs are split, stays."""
    now = GuardState(3, 1, 0.5, 7, mean_loss=9.0, losses=50, split_over_tokens=64)
    then = GuardState(0, 0, 1.0, 2, mean_loss=2.0, variance=0.1, losses=30)
    after = now.returned(GuardSettings(learning_rate_factor=0.1), then)
    assert after == GuardState(0, 2, 0.05, 7, 2.0, 0.1, 30, split_over_tokens=64)


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (OverBudgetError("over"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("can't allocate memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error: Exception, memory: bool) -> None:
    assert is_out_of_memory(error) == memory


def test_torchs_own_allocator_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def test_documents_are_split_in_order_and_none_is_cut() -> None:
    documents = [Tokens(range(n)) for n in (30, 30, 50, 10, 90)]
    sizes = [[len(d.ids) for d in part] for part in split(documents, 60)]
    assert sizes == [[30, 30], [50, 10], [90]]


def test_the_culprits_are_those_that_harm_alone_or_else_all() -> None:
    assert culprits([1, 2, 3], lambda d: d == 2) == [2]
    assert culprits([1, 2, 3], lambda d: False) == [1, 2, 3]
