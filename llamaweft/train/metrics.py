"""metrics.jsonl: one JSON object for every optimizer step and every validation."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llamaweft.files import write_text
from llamaweft.train.events import Event, StepEnded, Validated


class MetricsFile:
    """A listener that appends each event as it ends, flushed.

    A number that is not finite is null: JSON has no word for it.
    """

    def __init__(self, path: Path, resume_after_step: int | None = None) -> None:
        """`resume_after_step`: lines after it are dropped, since those steps run again."""
        if resume_after_step is not None and path.exists():
            kept = [r for r in read_metrics(path) if r["step"] <= resume_after_step]
            write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = path.open("a", encoding="utf-8")

    def __call__(self, event: Event) -> None:
        match event:
            case StepEnded():
                kind, values = "train", asdict(event)
            case Validated():
                kind, values = "validation", {"step": event.step, **event.metrics}
            case _:
                return
        finite = {name: v if math.isfinite(v) else None for name, v in values.items()}
        self._file.write(json.dumps({"kind": kind, **finite}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl. A last line cut short by a crash is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records
