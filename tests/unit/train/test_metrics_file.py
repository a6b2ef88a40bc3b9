"""metrics.jsonl: a JSON object a line, whatever was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llamaweft.train.events import Validated
from llamaweft.train.metrics import MetricsFile


def refuse(constant: str) -> None:
    pytest.fail(f"{constant} is not JSON")


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path)
    metrics(Validated(3, {"loss": float("nan"), "perplexity": float("inf"), "f1": 0.5}, True))
    metrics.close()
    record = json.loads(path.read_text(), parse_constant=refuse)
    assert record == {"kind": "validation", "step": 3, "loss": None, "perplexity": None, "f1": 0.5}
