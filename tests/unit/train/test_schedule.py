"""Learning rates: after the warm-up equal to transformers' schedules."""

from __future__ import annotations

import pytest
import torch
from transformers import get_scheduler

from llamaweft.train.schedule import LearningRate


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_equal_to_transformers_after_the_warm_up(kind: str) -> None:
    ours = LearningRate(0.1, kind, total_steps=20, warmup_steps=4)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    name = "constant_with_warmup" if kind == "constant" else kind
    theirs = get_scheduler(name, optimizer, num_warmup_steps=4, num_training_steps=20)
    for step in range(1, 21):
        if step > 4:
            assert ours(step) == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()


def test_the_warm_up_rises_from_above_zero_to_the_peak() -> None:
    rates = [LearningRate(0.1, "cosine", 20, 4)(step) for step in range(1, 6)]
    assert rates == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1])
