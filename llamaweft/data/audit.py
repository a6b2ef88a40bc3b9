"""The audit: mistakes in data that look like healthy runs, found before the first step.

A check passes, warns or blocks. What blocks stops `train`, unless the recipe's `audit.allow` names
it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from llamaweft.data.duplicates import repeated
from llamaweft.data.observe import Flag
from llamaweft.data.store import StoredRows, text_tokens
from llamaweft.data.targets import class_name

EXAMPLES_SHOWN = 5

FEW_ANSWERS, MANY_ROWS, ONE_SIDED = 20, 50, 0.9
"""Labels are told by their few different answers over many rows; one answer for nearly all of them
is learnt without looking at the question."""

BLOCKING = (
    "role_order",
    "empty_answer",
    "no_trained_token",
    "untrained_end_of_turn",
    "begin_of_text",
    "out_of_vocabulary",
    "untrained_token",
    "validation_leak",
    "too_long",
    "rare_class",
    "same_answers",
)
"""Checks that stop `train`."""

REMEDIES = {
    "unreadable_rows": "passed over, as data.on_bad_row: skip says",
    "role_order": "roles must be: one optional system, then user and assistant in turn",
    "empty_answer": "an assistant message is empty; fill or remove it",
    "no_trained_token": "nothing in the row would be learnt; give it an assistant answer or remove "
    "it",
    "untrained_end_of_turn": "the model would not learn to stop; the chat template must end an "
    "answer with a special token",
    "begin_of_text": "begin of text is missing or doubled; the chat template and the row must "
    "write it once",
    "out_of_vocabulary": "a token that the model has no embedding for; tokenizer and model do not "
    "belong together",
    "untrained_token": "a control token that the model never learnt, as base models have them; use "
    "the instruct model, or data.chat_template with tokens that were trained",
    "validation_leak": "the row is in the validation rows too, or nearly; remove it on one side, "
    "as data.clean with the step leakage does",
    "same_answers": "chosen and rejected become the same tokens; remove the row",
    "rare_class": "no other training row has its class, so it cannot be learnt and measured; add "
    "rows of it, or take it out",
    "validation_overlap": "shares 13 words in a row with the answer of a validation row",
    "too_long": "longer than data.max_length_tokens: {max_length_tokens}, so an answer would be "
    "cut; raise it or set data.on_too_long to split, drop or truncate",
    "duplicate": "the row is there more than once; data.clean with the step duplicates removes it",
    "control_token_text": "a message holds the text of a control token; it is read as plain text",
    "content_changed": "the chat template alters what a message says, white space included",
    "label_balance": "nearly all rows have the same answer: {answer}",
    "padding_is_end": "padding and end token are the same; harmless here, since nothing is padded "
    "and the end of turn is trained",
    "personal_data": "looks like a mail address, a telephone number or a key; look before you "
    "train on it",
}
"""What is wrong and what to do, in the order in which checks are shown."""


@dataclass(frozen=True)
class Finding:
    """One check. status: passed, warning, blocking, or allowed (by the recipe). count, share: rows
    it found, of all. examples: where the first of them are. remedy: what is wrong and what to
    do."""

    check: str
    status: str
    count: int
    share: float
    examples: list[str]
    remedy: str


@dataclass(frozen=True)
class Audit:
    """The findings, what was removed before (`cleaning`), and what will be learnt in numbers.
    lengths_tokens, trained_tokens_per_row: quantiles by name."""

    findings: list[Finding]
    cleaning: list[dict[str, Any]]
    rows: int
    validation_rows: int
    tokens: int
    trained_tokens: int
    longest_tokens: int
    lengths_tokens: dict[str, int]
    trained_tokens_per_row: dict[str, int]

    @property
    def blocking(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.status == "blocking"]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"passed": not self.blocking}


@dataclass(frozen=True)
class Material:
    """What is audited: rows of a store, before `on_too_long` is applied.

    leaks, overlaps: rows that a held-out row is in, as a whole or nearly, or in part. rare: rows
    with a class that no other row has.
    """

    stored: StoredRows
    rows_N: np.ndarray
    held_keys: np.ndarray
    rare: np.ndarray
    leaks: Collection[int]
    overlaps: Collection[int]
    cleaning: list[dict[str, Any]]
    bad_rows: int
    bad_examples: list[str]
    padding_is_end: str | None


def rows_by_check(material: Material, max_length_tokens: int) -> dict[str, np.ndarray]:
    """For each check, the rows of the store that it finds."""
    rows_N, table = material.rows_N, material.stored.table[material.rows_N]
    leak_N = np.isin(table["key"], material.held_keys) | np.isin(rows_N, list(material.leaks))
    masks = {
        str(flag.name).lower(): (table["flags"] & flag) > 0
        for flag in Flag
        if flag is not Flag.NEAR_DUPLICATE
    }
    masks |= {
        "no_trained_token": table["trained"] == 0,
        "validation_leak": leak_N,
        "validation_overlap": np.isin(rows_N, list(material.overlaps)) & ~leak_N,
        "too_long": text_tokens(table) > max_length_tokens,
        "duplicate": repeated(table["key"]),
        "label_balance": _one_sided(table),
        "rare_class": np.isin(rows_N, material.rare),
    }
    return {check: rows_N[mask] for check, mask in masks.items()}


def audit(
    material: Material,
    found: dict[str, np.ndarray],
    *,
    max_length_tokens: int,
    on_too_long: str | None,
    allow: Collection[str] = (),
    decode: Callable[[Sequence[int]], str] = str,
) -> Audit:
    """What `rows_by_check` found, judged. decode: token ids to text, to show an answer."""
    stored, count = material.stored, len(material.rows_N)
    table = stored.table[material.rows_N]
    words = {"max_length_tokens": max_length_tokens, "answer": ""}
    if len(found["label_balance"]):
        words["answer"] = repr(_answer(stored, int(found["label_balance"][0]), decode)[:60])

    def finding(check: str, rows: int, examples: list[str]) -> Finding:
        blocks = check in BLOCKING and not (check == "too_long" and on_too_long)
        status = ("allowed" if check in allow else "blocking") if blocks else "warning"
        remedy = REMEDIES[check].format(**words)
        share = min(1.0, rows / max(1, count))
        return Finding(check, status if rows else "passed", rows, share, examples, remedy)

    padding = [] if material.padding_is_end is None else [material.padding_is_end]
    of_all = {
        "unreadable_rows": finding("unreadable_rows", material.bad_rows, material.bad_examples),
        "padding_is_end": finding("padding_is_end", len(padding), padding),
    }
    findings = []
    for check in REMEDIES:
        rows = found.get(check, ())
        where = [stored.where(int(row)) for row in rows[:EXAMPLES_SHOWN]]
        findings.append(of_all.get(check) or finding(check, len(rows), where))
    return Audit(
        findings=findings,
        cleaning=material.cleaning,
        rows=count,
        validation_rows=len(material.held_keys),
        tokens=int(table["tokens"].sum(dtype=np.int64)),
        trained_tokens=int(table["trained"].sum(dtype=np.int64)),
        longest_tokens=int(table["tokens"].max(initial=0)),
        lengths_tokens=_quantiles(table["tokens"]),
        trained_tokens_per_row=_quantiles(table["trained"]),
    )


def _answer(stored: StoredRows, row: int, decode: Callable[[Sequence[int]], str]) -> str:
    """What the row should be answered with: its trained tokens, or its label."""
    document = stored.document(row)
    if document.labels is None:
        return decode(document.ids[document.weights > 0].tolist())
    seen = stored.state["classes"]
    positions, targets = (document.labels[name].tolist() for name in ("position", "target"))
    if seen:
        names = (class_name(seen[int(t)]) for t in targets if t >= 0)
        return ", ".join(names) or "no class"
    if positions[0] < 0:  # one number
        return f"{targets[0]:g}"
    first, last = positions  # an answer that is read off a text
    return decode(document.ids[first : last + 1].tolist()) if last else "no answer"


def _one_sided(rows_N: np.ndarray) -> np.ndarray:
    """A mask of the rows whose answer nearly all others give too, where answers are labels; pairs
    of texts have none."""
    answers_N, none = rows_N["answer"], np.zeros(len(rows_N), bool)
    if len(answers_N) < MANY_ROWS or rows_N["second"].any():
        return none
    values, counts = np.unique(answers_N, return_counts=True)
    most = int(counts.argmax())
    if len(values) > FEW_ANSWERS or counts[most] < ONE_SIDED * len(answers_N):
        return none
    return answers_N == values[most]


def _quantiles(values_N: np.ndarray) -> dict[str, int]:
    if not len(values_N):
        return {}
    shares = {"least": 0.0, "median": 0.5, "p90": 0.9, "p99": 0.99, "most": 1.0}
    return {name: int(np.quantile(values_N, share)) for name, share in shares.items()}


def audit_in_words(content: dict[str, Any]) -> str:
    """Rows and tokens of an `Audit.to_dict()`, of this version or an older one."""
    labels = ("rows", "training rows"), ("validation_rows", "held-out rows"), ("tokens", "tokens")
    parts = [f"{content[key]:,} {label}" for key, label in labels if key in content]
    if content.get("tokens") and "trained_tokens" in content:
        share = content["trained_tokens"] / content["tokens"]
        parts.append(f"{content['trained_tokens']:,} of them trained ({share:.1%})")
    if "longest_tokens" in content:
        parts.append(f"longest row {content['longest_tokens']:,} tokens")
    return ", ".join(parts)


def finding_in_words(finding: dict[str, Any]) -> dict[str, str]:
    """A finding of an `Audit.to_dict()` as it is shown, without its examples."""
    passed = finding["status"] == "passed"
    return {
        "check": str(finding["check"]),
        "status": str(finding["status"]),
        "rows": f"{finding['count']:,}",
        "share": f"{finding['share']:.1%}",
        # what a passed check would have advised is noise
        "remedy": "" if passed else str(finding["remedy"]),
    }
