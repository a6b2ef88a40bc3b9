"""Finding ranks that keep the others waiting."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

SLOW = 1.5
"""Times the middle rank's seconds from which on a rank lags."""

STEPS = 5
"""Steps in a row after which that is said, and said again."""


@dataclass
class Lags:
    """Counts, for each rank, the steps in a row in which it lagged."""

    steps: dict[int, int] = field(default_factory=dict)

    def of(self, seconds: Sequence[float]) -> list[tuple[int, float]]:
        """seconds: that each rank worked in a step, without waiting. Returns the ranks that have
        lagged for STEPS steps, and how many times as long as the middle one they took."""
        middle = statistics.median_low(seconds)
        found = []
        for rank, own in enumerate(seconds):
            lags = own > SLOW * middle > 0
            self.steps[rank] = self.steps.get(rank, 0) + 1 if lags else 0
            if lags and self.steps[rank] % STEPS == 0:
                found.append((rank, own / middle))
        return found
