"""A contender's side of the conversation: one optimizer step for each `go` on standard input.

The contender trains as it always does and calls `step_ended` at the end of every step. The first
step is a warm-up and answers `ready`; then each `go` is answered by one JSON line. Anything but
`go`, the end of the input included, means stop.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any


class StepServer:
    """Takes standard output for its answers; what libraries print goes to standard error."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        self._began = time.perf_counter()
        self._kind = "ready"

    def step_ended(self, **figures: Any) -> bool:
        """Answer with the figures and the wall clock since `go`, and wait for the next order.

        False: stop. Memory is read from outside, so that it costs the contender nothing.
        """
        seconds = time.perf_counter() - self._began
        answer = {"kind": self._kind, "seconds": seconds, **figures}
        self._answers.write(json.dumps(answer) + "\n")
        self._kind = "step"
        going_on = sys.stdin.readline().strip() == "go"
        self._began = time.perf_counter()
        return going_on
