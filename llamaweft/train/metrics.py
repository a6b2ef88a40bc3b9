"""metrics.jsonl: one JSON object for every optimizer step and every validation."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llamaweft.files import write_text
from llamaweft.train.events import Event, StepEnded, Validated, WentBack
from llamaweft.train.run_folder import read_lines


class MetricsFile:
    """A listener that appends each event as it ends, flushed.

    A number that is not finite is null: JSON has no word for it.
    """

    def __init__(
        self,
        path: Path,
        resume_after_step: int | None = None,
        *,
        validation_comes: bool = False,
    ) -> None:
        """`resume_after_step`: lines after it are dropped, since those steps run again, and where
        `validation_comes` that step's validation too."""
        self.path = path
        if resume_after_step is not None and path.exists():
            self._forget_after(resume_after_step, validation_comes)
        self._file = path.open("a", encoding="utf-8")

    def _forget_after(self, step: int, validation_comes: bool = False) -> None:
        kept = [r for r in read_metrics(self.path) if r["step"] <= step]
        if validation_comes:
            kept = [r for r in kept if r["step"] < step or r["kind"] == "train"]
        write_text(self.path, "".join(json.dumps(record) + "\n" for record in kept))

    def __call__(self, event: Event) -> None:
        match event:
            case StepEnded():
                kind, values = "train", asdict(event)
            case Validated():
                kind, values = "validation", {"step": event.step, **event.metrics}
            case WentBack(to_step=step):
                self._file.close()
                self._forget_after(step)
                self._file = self.path.open("a", encoding="utf-8")
                return
            case _:
                return
        finite = {name: v if math.isfinite(v) else None for name, v in values.items()}
        self._file.write(json.dumps({"kind": kind, **finite}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl. A last line cut short by a crash is left out.

    Raises UserError where another is damaged.
    """
    return read_lines(path)
