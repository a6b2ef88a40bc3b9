"""The report of a training run: report.html with curves, report.md without.

Everything a run holds may hold anything: prompts, answers, names, the recipe. It is shown as text.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, takewhile
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from llamaweft.data.audit import audit_in_words, finding_in_words
from llamaweft.evaluate.confusion import confusion_matrix
from llamaweft.evaluate.curves import panels
from llamaweft.evaluate.report_forgetting import COLUMNS, forgetting_view
from llamaweft.evaluate.report_markdown import markdown_report
from llamaweft.evaluate.report_metrics import NOTHING, compare_metrics, finite, headline

NOT_SHOWN = ("packages", "rebuild", "sbom", "torch_build", "cpu_flags")
"""Long lists of environment.json, for a program to read."""
MAX_EXAMPLES = 20
MAX_CHARACTERS = 4000
"""Of a prompt or an answer; the rest is counted, not shown."""

_CONTROL = {c: "\ufffd" for c in (*range(32), *range(127, 160)) if c not in (9, 10, 13)}
_STATUS_ORDER = ("blocking", "warning", "passed")


@dataclass(frozen=True)
class ReportInput:
    """What a report is made of. Any part may be empty.

    title: the run folder's name. command: reproduces the run. environment: versions, hardware,
    device, compute dtype and its reason, commit. audit: Audit.to_dict(). plan: free-form; shown
    against what was measured where it has seconds_per_step or peak_bytes; parts: bytes by name.
    metrics: records of metrics.jsonl. evaluations: {"name", "before": {"metrics"},
    "after": {"metrics"} or None, "difference", "confusion" and "forgetting" or nothing, "examples":
    [{"prompt", "reference", "before", "after"}]}. notes: what a reader should know first.
    """

    title: str
    command: str
    recipe_yaml: str
    environment: dict[str, Any]
    audit: dict[str, Any]
    plan: dict[str, Any]
    metrics: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    notes: Sequence[str] = ()


def write_report(run: ReportInput, html: Path, markdown: Path) -> None:
    """Write both files, each complete or not at all."""
    view = _view(run)
    page, text = _html(view), markdown_report(view)
    _write(html, page)
    _write(markdown, text)


def metric_table(evaluation: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """(metric, before, after, verdict) of each metric, as "12.0% [9.1%, 15.2%]".

    verdict: better or worse only where the paired test in "difference" says so.
    """
    return [(m["name"], m["before"], m["after"], m["verdict"]) for m in compare_metrics(evaluation)]


def _view(run: ReportInput) -> dict[str, Any]:
    """Everything that a page shows, as text and numbers, whatever its markup."""
    train = [record for record in run.metrics if record.get("kind") == "train"]
    evaluations = [_evaluation(evaluation) for evaluation in run.evaluations]
    return {
        "title": run.title or "Training report",
        "headline": headline(evaluations),
        "notes": list(run.notes),
        "evaluations": evaluations,
        "forgetting_columns": COLUMNS,
        "panels": panels(run.metrics),
        "cost": _cost(train),
        "audit": _audit(run.audit),
        "plan": _plan(run.plan, train),
        "recipe": run.recipe_yaml,
        "environment": list(
            _flat({key: run.environment[key] for key in run.environment if key not in NOT_SHOWN})
        ),
        "command": run.command,
    }


def _html(view: dict[str, Any]) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja").render(view)


def _write(path: Path, text: str) -> None:
    """Aside and renamed. Control characters would be invisible or act on a terminal."""
    aside = path.with_name(f".{path.name}.tmp")
    try:
        with aside.open("w", encoding="utf-8", errors="replace") as handle:
            handle.write(text.translate(_CONTROL))
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _evaluation(evaluation: dict[str, Any]) -> dict[str, Any]:
    examples = evaluation.get("examples") or []
    forgetting = evaluation.get("forgetting")
    return {
        "name": str(evaluation["name"]),
        "metrics": compare_metrics(evaluation),
        "confusion": [
            (side, matrix)
            for side in ("before", "after")
            if (matrix := confusion_matrix((evaluation.get("confusion") or {}).get(side)))
        ],
        "examples": [_example(example) for example in examples[:MAX_EXAMPLES]],
        "examples_in_all": len(examples),
        "forgetting": forgetting_view(forgetting),
        "general_examples": [_example(e) for e in (forgetting or {}).get("examples", [])],
    }


def _example(example: dict[str, Any]) -> dict[str, Any]:
    """The texts, clipped; and pieces (text, differs) of them, word by word.

    In an answer differs what the reference lacks; in the reference what the newest answer lacks.
    """
    view: dict[str, Any] = {}
    for key in ("prompt", "reference", "before", "after"):
        text = example.get(key)
        view[key] = None if text is None else _clip(str(text))
    reference = view["reference"] or ""
    newest = view["before"] if view["after"] is None else view["after"]
    view["reference_pieces"] = differences(reference, reference if newest is None else newest)
    for key in ("before", "after"):
        answer = view[key] or ""
        view[f"{key}_pieces"] = differences(answer, reference)
        view[f"{key}_same"] = bool(reference) and answer.strip() == reference.strip()
    return view


def differences(text: str, other: str) -> list[tuple[str, bool]]:
    """`text` in pieces, each with whether its words are missing from `other` at that place."""
    parts = re.findall(r"\w+|[^\w\s]|\s+", text)
    words = [part for part in parts if not part.isspace()]
    others = re.findall(r"\w+|[^\w\s]", other)
    begin = sum(
        1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(words, others, strict=False))
    )
    differs = [False] * begin + [not same for same in _matched(words[begin:], others[begin:])]
    flags, done = [], 0
    for part in parts:
        if part.isspace():  # marked between two marked words, so that a mark runs through
            flags.append(all(differs[done - 1 : done + 1]) and 0 < done < len(words))
        else:
            flags.append(differs[done])
            done += 1
    runs = groupby(zip(parts, flags, strict=True), key=lambda pair: pair[1])
    return [("".join(part for part, _ in run), flag) for flag, run in runs]


def _matched(words: list[str], others: list[str]) -> list[bool]:
    """Which of `words` stand in `others` too, in that order.

    difflib takes minutes for a model that repeats itself, unless its heuristic for frequent
    elements is on; that one looks only at the second sequence and only from 200 elements.
    """
    turned = len(words) > len(others)
    pair = (others, words) if turned else (words, others)
    same = [False] * len(words)
    for block in difflib.SequenceMatcher(None, *pair).get_matching_blocks():
        start = block.b if turned else block.a
        same[start : start + block.size] = [True] * block.size
    return same


def _clip(text: str) -> str:
    more = len(text) - MAX_CHARACTERS
    return text if more <= 0 else f"{text[:MAX_CHARACTERS]} … ({more:,} more characters)"


def _cost(train: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """What the steps took, as (what, how much)."""
    if not train:
        return []
    seconds = _sum(train, "seconds")
    rows = [
        ("Optimizer steps", f"{len(train):,}"),
        ("Wall time of the steps", _duration(seconds)),
        ("Tokens", f"{_sum(train, 'tokens'):,.0f}"),
        ("Trained tokens", f"{_sum(train, 'trained_tokens'):,.0f}"),
        ("Peak anonymous memory", _bytes(_peak(train, "anon_bytes"))),
    ]
    if device := _peak(train, "device_bytes"):
        rows.append(("Peak device memory", _bytes(device)))
    if seconds:
        work = sum(_number(r, "useful_flops_per_second") * _number(r, "seconds") for r in train)
        rows += [
            ("Mean tokens per second", f"{_sum(train, 'tokens') / seconds:,.1f}"),
            ("Mean useful GFLOP/s", f"{work / seconds / 1e9:,.1f}"),
        ]
    return rows


def _audit(audit: dict[str, Any]) -> dict[str, Any]:
    findings = sorted(
        audit.get("findings", []),
        key=lambda f: _STATUS_ORDER.index(f["status"]) if f["status"] in _STATUS_ORDER else 0,
    )
    return {
        "summary": audit_in_words(audit),
        "findings": [
            finding_in_words(f) | {"examples": ", ".join(map(str, f["examples"]))} for f in findings
        ],
    }


def _plan(plan: dict[str, Any], train: list[dict[str, Any]]) -> dict[str, Any]:
    """The plan against what was measured, the planned parts of memory, and the rest of it."""
    compared = []
    device = _peak(train, "device_bytes")
    for key, label, measured, show in (
        (
            "seconds_per_step",
            "Seconds a step",
            _sum(train, "seconds") / (len(train) or 1),
            _seconds,
        ),
        ("peak_bytes", "Peak memory", device or _peak(train, "anon_bytes"), _bytes),
    ):
        if (planned := finite(plan.get(key))) is not None:
            ratio = f"{measured / planned:.2f}" if planned and measured else NOTHING
            compared.append((label, show(planned), show(measured) if measured else NOTHING, ratio))
    parts = plan.get("parts")
    parts = parts if isinstance(parts, dict) else {}
    rest = {k: v for k, v in plan.items() if k not in ("seconds_per_step", "peak_bytes", "parts")}
    return {
        "compared": compared,
        "parts": [
            (str(name), _bytes(size) if finite(size) is not None else str(size))
            for name, size in parts.items()
        ],
        "rest": list(_flat(rest)),
    }


def _flat(content: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Nested dicts as (dotted key, text)."""
    if isinstance(content, dict):
        for key, inner in content.items():
            yield from _flat(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(content, list | tuple):
        yield path, ", ".join(map(str, content))
    else:
        yield path, NOTHING if content is None else str(content)


def _number(record: dict[str, Any], field: str) -> float:
    return finite(record.get(field)) or 0.0


def _sum(train: list[dict[str, Any]], field: str) -> float:
    return math.fsum(_number(record, field) for record in train)


def _peak(train: list[dict[str, Any]], field: str) -> float:
    return max((_number(record, field) for record in train), default=0.0)


def _bytes(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds < 100 else f"{seconds:,.0f} s"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return _seconds(seconds)
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"
