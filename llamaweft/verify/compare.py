"""What two runs that should be one have in common: every bit of their newest checkpoints, every
number of their steps, every pack in its place."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from llamaweft.train.checkpoint import complete_checkpoints, read_state
from llamaweft.train.metrics import read_metrics
from llamaweft.train.run_folder import RunFolder, read_json, read_lines
from llamaweft.verify.part import order_file

TIMES = (
    "seconds",
    "tokens_per_second",
    "useful_flops_per_second",
    "anon_bytes",
    "rss_bytes",
    "device_bytes",
)
"""What a clock or the system says of a step."""

MOST_SAID = 5
"""Differences of one kind that are named."""


@dataclass
class Comparison:
    """steps, packs, tensors: how many were compared. differences: a sentence for each."""

    steps: int = 0
    packs: int = 0
    tensors: int = 0
    differences: list[str] = field(default_factory=list)

    def found(self, differences: Iterator[str]) -> None:
        every = list(differences)
        self.differences += every[:MOST_SAID]
        if len(every) > MOST_SAID:
            self.differences.append(f"and {len(every) - MOST_SAID} more of this kind")


def compare_runs(
    whole: Path,
    resumed: Path,
    after: int,
    expected: Mapping[tuple[int, int], str] | None = None,
) -> Comparison:
    """Hold a run that was interrupted and resumed against an uninterrupted one, from step `after`
    on: weights, optimizer, random numbers, state, metrics, the order of packs, and the evaluation
    where there is one. expected: the rows that stand at each (step, pack), where that is known from
    elsewhere."""
    comparison = Comparison()
    ours, theirs = (complete_checkpoints(run / "checkpoints")[-1:] for run in (whole, resumed))
    if [p.name for p in ours] != [p.name for p in theirs] or not ours:
        names = [p[0].name if p else "none" for p in (ours, theirs)]
        comparison.differences.append(f"the newest checkpoint is {names[0]}, resumed: {names[1]}")
    else:
        for name in sorted(p.name for p in ours[0].glob("*.safetensors")):
            comparison.found(_tensors(comparison, ours[0] / name, theirs[0] / name))
        comparison.found(_states(ours[0], theirs[0]))
    comparison.found(_metrics(comparison, whole, resumed, after))
    comparison.found(_orders(comparison, whole, resumed))
    comparison.found(_displaced(whole, expected or {}))
    evaluations = [read_json(RunFolder(run).evaluation) for run in (whole, resumed)]
    if evaluations[0] != evaluations[1]:
        comparison.differences.append("evaluation.json differs")
    return comparison


def _tensors(comparison: Comparison, ours: Path, theirs: Path) -> Iterator[str]:
    """What differs between two files of tensors, one tensor in memory at a time."""
    if not theirs.exists():
        yield f"{ours.name} is not there in the resumed run"
        return
    with safe_open(ours, framework="pt") as left, safe_open(theirs, framework="pt") as right:
        names = {*left.keys()}, {*right.keys()}
        for name in sorted(names[0] ^ names[1]):
            yield f"{ours.name}: {name} is in one of the runs only"
        for name in sorted(names[0] & names[1]):
            comparison.tensors += 1
            differing, count = _differing(left.get_tensor(name), right.get_tensor(name))
            if differing:
                yield f"{ours.name}: {name} differs in {differing:,} of {count:,} numbers"


def _differing(left: Tensor, right: Tensor) -> tuple[int, int]:
    """(how many numbers differ in any bit, of how many)."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return left.numel(), left.numel()
    if not left.numel():
        return 0, 0
    bytes_N8 = [t.contiguous().reshape(-1, 1).view(torch.uint8) for t in (left, right)]
    return int((bytes_N8[0] != bytes_N8[1]).any(-1).sum()), left.numel()


def _states(ours: Path, theirs: Path) -> Iterator[str]:
    """What the loop carries. The schedule may be another: what is kept changes no number."""
    left, right = (asdict(read_state(folder)) for folder in (ours, theirs))
    for key in sorted(left.keys() - {"schedule"}):
        if json.dumps(left[key]) != json.dumps(right[key]):  # no number is unequal to itself
            yield f"state.json: {key} is {left[key]!r}, resumed: {right[key]!r}"


def _metrics(comparison: Comparison, whole: Path, resumed: Path, after: int) -> Iterator[str]:
    left, right = (
        [r for r in read_metrics(run / "metrics.jsonl") if r["step"] > after]
        for run in (whole, resumed)
    )
    steps = [[(r["kind"], r["step"]) for r in records] for records in (left, right)]
    if steps[0] != steps[1]:
        yield f"metrics.jsonl: its lines are of steps {_said(steps[0])}, resumed: {_said(steps[1])}"
        return
    comparison.steps = sum(r["kind"] == "train" for r in left)
    for ours, theirs in zip(left, right, strict=True):
        for key in ours.keys() - {*TIMES}:
            if ours[key] != theirs.get(key):
                yield f"step {ours['step']}: {key} is {ours[key]}, resumed: {theirs.get(key)}"


def _said(steps: list[tuple[str, int]]) -> str:
    return " ".join(str(step) for kind, step in steps if kind == "train") or "none"


def _orders(comparison: Comparison, whole: Path, resumed: Path) -> Iterator[str]:
    """Which packs were computed. Those after the checkpoint that was resumed from come twice."""
    (left, _), (right, changed) = (_order(run) for run in (whole, resumed))
    for step, pack in changed:
        yield f"step {step}, pack {pack + 1}: other rows were computed the second time"
    for step, pack in sorted(left.keys() - right.keys()):
        yield f"step {step}, pack {pack + 1} was not computed by the resumed run"
    for step, pack in sorted(right.keys() - left.keys()):
        yield f"step {step}, pack {pack + 1} was computed by the resumed run only"
    for place in sorted(left.keys() & right.keys()):
        comparison.packs += 1
        if left[place] != right[place]:
            yield f"step {place[0]}, pack {place[1] + 1}: other rows were computed"


def _displaced(whole: Path, expected: Mapping[tuple[int, int], str]) -> Iterator[str]:
    """Packs of the uninterrupted run that are not those of their place. One that was computed in
    parts is not looked at."""
    found, _ = _order(whole)
    for place, rows in expected.items():
        if found.get(place) != [rows] and len(found.get(place, ())) < 2:
            yield f"step {place[0]}, pack {place[1] + 1} has not the rows of that place in the data"


def _order(run: Path) -> tuple[dict[tuple[int, int], list[str]], list[tuple[int, int]]]:
    """The rows of each (step, pack) as they were last computed, and the places where that was not
    what had been computed before. A pack that is computed in parts has several lines."""
    attempts: dict[tuple[int, int], list[list[str]]] = defaultdict(list)
    before: tuple[int, ...] = ()
    for line in read_lines(order_file(run)):
        place = line["step"], line["pack"]
        if (line["process"], *place) != before:
            attempts[place].append([])
        attempts[place][-1].append(line["rows"])
        before = line["process"], *place
    last = {place: tries[-1] for place, tries in attempts.items()}
    return last, [place for place, tries in attempts.items() if _disagree(tries)]


def _disagree(tries: list[list[str]]) -> bool:
    """Whether what was computed again differs. A try that was killed may be shorter."""
    return any(rows != tries[-1][: len(rows)] for rows in tries)


def said(comparison: Comparison) -> dict[str, Any]:
    return asdict(comparison) | {"passed": not comparison.differences}
