"""metrics.jsonl: a JSON object a line, whatever was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llamaweft.errors import UserError
from llamaweft.train.events import Validated
from llamaweft.train.metrics import MetricsFile, read_metrics


def refuse(constant: str) -> None:
    pytest.fail(f"{constant} is not JSON")


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path)
    metrics(Validated(3, {"loss": float("nan"), "perplexity": float("inf"), "f1": 0.5}, True))
    metrics.close()
    record = json.loads(path.read_text(), parse_constant=refuse)
    assert record == {"kind": "validation", "step": 3, "loss": None, "perplexity": None, "f1": 0.5}


def write(path: Path, *lines: str) -> None:
    path.write_text("".join(lines), encoding="utf-8")


LINES = [
    '{"kind": "train", "step": 1}\n',
    '{"kind": "train", "step": 2}\n',
    '{"kind": "validation", "step": 2}\n',
    '{"kind": "train", "step": 3}\n',
]


@pytest.mark.parametrize(("comes", "kept"), [(False, 3), (True, 2)])
def test_a_validation_that_comes_again_is_not_there_twice(
    tmp_path: Path, comes: bool, kept: int
) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, *LINES)
    MetricsFile(path, 2, validation_comes=comes).close()
    assert path.read_text() == "".join(LINES[:kept])


def test_a_last_line_cut_short_is_left_out_and_another_damaged_one_is_named(
    tmp_path: Path,
) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, *LINES[:2], LINES[2][:10])
    assert [record["step"] for record in read_metrics(path)] == [1, 2]
    write(path, LINES[0], LINES[1].replace("}", "]"), LINES[2])
    with pytest.raises(UserError, match=r"metrics\.jsonl line 2 is damaged"):
        read_metrics(path)
    path.write_bytes(b"\xff\n")
    with pytest.raises(UserError, match="is no UTF-8"):
        read_metrics(path)
