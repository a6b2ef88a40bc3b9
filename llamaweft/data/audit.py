"""The audit: mistakes in data that look like healthy runs, found before the first step.

A check passes, warns or blocks. What blocks stops `train`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from llamaweft.data.chat import Document, Tokenizer, special_ids, stop_ids
from llamaweft.data.formats import Example

EXAMPLES_SHOWN = 5

_PERSONAL = re.compile(
    r"[\w.+-]+@[\w-]+\.[a-z]{2,}"  # mail address
    r"|(?<![\w.])\+?\d{1,3}[ -]?\(?\d{2,4}\)?(?:[ -]\d{2,4}){2,3}(?!\w)"  # telephone number
    r"|\b(?:sk|ghp|hf|xox[bp]|AKIA)[-_]?[A-Za-z0-9]{16,}\b",  # keys
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Finding:
    """One check. status: passed, warning or blocking. count, share: rows it found, of all.
    examples: where the first of them are. remedy: what is wrong and what to do."""

    check: str
    status: str
    count: int
    share: float
    examples: list[str]
    remedy: str


@dataclass(frozen=True)
class Audit:
    """The findings, and what will be learnt in numbers."""

    findings: list[Finding]
    rows: int
    validation_rows: int
    tokens: int
    trained_tokens: int
    longest_tokens: int

    @property
    def blocking(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.status == "blocking"]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"passed": not self.blocking}


def audit(
    tokenizer: Tokenizer,
    examples: list[Example],
    documents: list[Document],
    validation: list[Example],
    *,
    max_length_tokens: int,
    on_too_long: str | None,
) -> Audit:
    """Check the training rows against each other, the tokenizer and the held-out rows.

    `documents` are those of `examples`, before `on_too_long` is applied.
    """
    rows = len(documents)
    held_out = {example.key for example in validation}
    stops, special = stop_ids(tokenizer), special_ids(tokenizer)
    begin = _begin_of_text(tokenizer)
    seen: set[str] = set()

    def repeats(example: Example) -> bool:
        known = example.key in seen
        seen.add(example.key)
        return known

    def finding(check: str, found: Iterable[str], remedy: str, status: str = "blocking") -> Finding:
        where = list(found)
        status = status if where else "passed"
        return Finding(check, status, len(where), len(where) / rows, where[:EXAMPLES_SHOWN], remedy)

    chats = [example for example in examples if example.text is None]
    findings = [
        finding(
            "role_order",
            (e.where for e in chats if not _roles_in_order(e)),
            "roles must be: one optional system, then user and assistant in turn",
        ),
        finding(
            "empty_answer",
            (e.where for e in chats if any(_is_empty_answer(m) for m in e.messages)),
            "an assistant message is empty; fill or remove it",
        ),
        finding(
            "no_trained_token",
            (d.where for d in documents if d.trained_tokens == 0),
            "nothing in the row would be learnt; give it an assistant answer or remove it",
        ),
        finding(
            "untrained_end_of_turn",
            (d.where for d in documents if d.trained_tokens and not _ends_with(d, stops, special)),
            "the model would not learn to stop; the chat template must end an answer with a "
            "special token",
        ),
        finding(
            "begin_of_text",
            (d.where for d in documents if not _begins_once(d, begin, tokenizer.bos_token_id)),
            "begin of text is missing or doubled; the chat template and the row must write it once",
        ),
        finding(
            "validation_leak",
            (e.where for e in examples if e.key in held_out),
            "the row is in the validation rows too; remove it on one side",
        ),
        finding(
            "too_long",
            (d.where for d in documents if len(d.ids) > max_length_tokens),
            f"longer than data.max_length_tokens: {max_length_tokens}, so an answer would be cut; "
            "raise it or set data.on_too_long to split, drop or truncate",
            "warning" if on_too_long else "blocking",
        ),
        finding(
            "duplicate",
            (e.where for e in examples if repeats(e)),
            "the row is there more than once",
            "warning",
        ),
        finding(
            "padding_is_end",
            [tokenizer.name_or_path] if _padding_is_end(tokenizer, stops) else [],
            "padding and end token are the same; harmless here, since nothing is padded",
            "warning",
        ),
        finding(
            "personal_data",
            (e.where for e in examples if _PERSONAL.search(e.key)),
            "looks like a mail address, a telephone number or a key; look before you train on it",
            "warning",
        ),
    ]
    return Audit(
        findings=findings,
        rows=rows,
        validation_rows=len(validation),
        tokens=sum(len(d.ids) for d in documents),
        trained_tokens=sum(d.trained_tokens for d in documents),
        longest_tokens=max((len(d.ids) for d in documents), default=0),
    )


def _roles_in_order(example: Example) -> bool:
    roles = [message["role"] for message in example.messages]
    if roles and roles[0] == "system":
        roles = roles[1:]
    expected = ("user", "assistant")
    return bool(roles) and all(role == expected[i % 2] for i, role in enumerate(roles))


def _is_empty_answer(message: dict[str, str]) -> bool:
    return message["role"] == "assistant" and not message["content"].strip()


def _ends_with(document: Document, stops: set[int], special: set[int]) -> bool:
    """Whether the last trained token ends a turn. With `train_on: all` white space may follow."""
    trained = document.ids[np.flatnonzero(document.weights)]
    tail = [int(token) for token in trained[-3:] if int(token) in special]
    return bool(tail) and tail[-1] in stops


def _begin_of_text(tokenizer: Tokenizer) -> bool:
    """Whether this tokenizer puts a begin-of-text token before plain text."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]


def _begins_once(document: Document, expected: bool, bos: int | None) -> bool:
    if bos is None:
        return True
    first = [int(token) for token in document.ids[:2]]
    return first != [bos, bos] and (not expected or first[:1] == [bos])


def _padding_is_end(tokenizer: Tokenizer, stops: set[int]) -> bool:
    return tokenizer.pad_token_id is not None and tokenizer.pad_token_id in stops
