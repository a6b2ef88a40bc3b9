"""The report as Markdown: headings, plain tables and fenced text, no HTML at all."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from llamaweft.evaluate.curves import summary_rows
from llamaweft.evaluate.report_metrics import NOTHING


def markdown_report(view: dict[str, Any]) -> str:
    """The text of report.md from what the report shows."""
    blocks = [f"# {escape(view['title'])}", f"**{escape(view['headline']['text'])}**"]
    blocks += [escape(note) for note in view["notes"]]
    for evaluation in view["evaluations"]:
        blocks += _evaluation(evaluation)
    for evaluation in view["evaluations"]:
        blocks += _forgetting(evaluation, view["forgetting_columns"])
    if view["panels"]:
        head = ("Curve", "Points", "First", "Last", "Lowest", "Highest", "Mean")
        blocks += ["## Curves", table(head, summary_rows(view["panels"]))]
        blocks += [
            f"{escape(panel.title)}: {panel.lost:,} steps had no finite value."
            for panel in view["panels"]
            if panel.lost
        ]
    for evaluation in view["evaluations"]:
        blocks += _examples(evaluation)
    if view["cost"]:
        blocks += ["## What it cost", table(("What", "Measured"), view["cost"])]
    blocks += _audit(view["audit"]) + _plan(view["plan"])
    for heading, text, language in (
        ("Recipe", view["recipe"], "yaml"),
        ("Environment", view["environment"], None),
        ("Command", view["command"], "sh"),
    ):
        if text and language:
            blocks += [f"## {heading}", fenced(text, language)]
        elif text:
            blocks += [f"## {heading}", table(("What", "Value"), text)]
    return "\n\n".join(blocks) + "\n"


def _evaluation(evaluation: dict[str, Any]) -> list[str]:
    if not evaluation["metrics"]:
        return []
    keys = ("name", "before", "after", "difference", "verdict", "rows")
    head = ("Metric", "Before", "After", "After - before", "Verdict", "Rows")
    rows = [[metric[key] for key in keys] for metric in evaluation["metrics"]]
    return [
        f"## Held out: {escape(evaluation['name'])}",
        table(head, rows),
        "In brackets: the 95% interval. Better or worse: that of after - before, over the same "
        "rows, is without 0.",
    ]


def _forgetting(evaluation: dict[str, Any], columns: Sequence[str]) -> list[str]:
    forgetting = evaluation["forgetting"]
    if forgetting is None:
        return []
    blocks = ["## Forgetting", f"{escape(forgetting['summary'])}."]
    if forgetting["budget"] is not None:
        blocks.append(escape(forgetting["budget"]))
    blocks.append(table(columns, forgetting["rows"]))
    if evaluation["general_examples"]:
        blocks.append(_answers(evaluation["general_examples"]))
    return blocks


def _examples(evaluation: dict[str, Any]) -> list[str]:
    if not evaluation["examples"]:
        return []
    shown = evaluation["examples"]
    return [
        f"## Answers: {escape(evaluation['name'])}",
        f"{len(shown)} of {evaluation['examples_in_all']:,} answers. ⏎ is the end of a line.",
        _answers(shown),
    ]


def _answers(examples: Sequence[dict[str, Any]]) -> str:
    keys = ("prompt", "reference", "before", "after")
    rows = [
        (str(number), *(NOTHING if example[key] is None else example[key] for key in keys))
        for number, example in enumerate(examples, start=1)
    ]
    return table(("#", "Prompt", "Reference", "Before", "After"), rows)


def _audit(audit: dict[str, Any]) -> list[str]:
    if not audit["findings"] and not audit["summary"]:
        return []
    blocks = ["## Audit of the data"]
    if audit["summary"]:
        blocks.append(f"{escape(audit['summary'])}.")
    if audit["findings"]:
        keys = ("status", "check", "rows", "share", "remedy", "examples")
        head = ("Status", "Check", "Rows", "Share", "What to do", "For example")
        blocks.append(table(head, [[f[key] for key in keys] for f in audit["findings"]]))
    return blocks


def _plan(plan: dict[str, Any]) -> list[str]:
    blocks = []
    if plan["compared"]:
        head = ("What", "Planned", "Measured", "Measured / planned")
        blocks.append(table(head, plan["compared"]))
    if plan["parts"]:
        blocks.append(table(("Part of the planned memory", "Size"), plan["parts"]))
    if plan["rest"]:
        blocks.append(table(("Decided by the plan", "Value"), plan["rest"]))
    return ["## Plan and measurement", *blocks] if blocks else []


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table. Every cell is text: nothing in it can end its cell, row or table."""
    lines = [head, ["---"] * len(head), *([escape(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def escape(text: str) -> str:
    """Any text as one line that Markdown shows as it is.

    Pipes are written as an entity: what a backslash before a pipe means differs by renderer.
    """
    line = " ⏎ ".join(text.strip().splitlines())
    line = re.sub(r"[\\`*~$]|\](?=[(\[:])|(?<!\w)_|_(?!\w)", r"\\\g<0>", line)
    entities = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "&#124;"}
    line = re.sub(r"[&<>|]", lambda found: entities[found[0]], line)
    return re.sub(r"^#|^[-+](?=\s|$)", r"\\\g<0>", line)


def fenced(text: str, language: str) -> str:
    """Text in a fence that is longer than any run of backticks in it."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
