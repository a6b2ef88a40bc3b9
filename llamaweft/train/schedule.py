"""The learning rate of each step: warm-up, then cosine, linear or constant.

Shapes as in transformers' get_*_schedule_with_warmup.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class LearningRate:
    """`peak`: highest rate. `total_steps`, `warmup_steps`: lengths in optimizer steps."""

    peak: float
    kind: str
    total_steps: int
    warmup_steps: int

    def __call__(self, step: int) -> float:
        """The rate of the step with this number, counted from 1."""
        done = step - 1
        if done < self.warmup_steps:
            # Unlike transformers, the first step is not wasted at a rate of 0.
            return self.peak * step / (self.warmup_steps + 1)
        progress = (done - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        match self.kind:
            case "constant":
                return self.peak
            case "linear":
                return self.peak * (1 - progress)
            case "cosine":
                return self.peak * 0.5 * (1 + math.cos(math.pi * progress))
        raise ValueError(f"unknown lr_scheduler_type {self.kind}")
