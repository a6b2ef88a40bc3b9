"""Row shapes: from whatever columns people have to one kind of example.

A shape is recognised by its columns, or named. Every chat shape becomes messages.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from llamaweft.data.sources import Row
from llamaweft.errors import UserError

Message = dict[str, str]

REQUIRED = {
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
"""The columns that a row of each shape must have."""


@dataclass(frozen=True)
class Example:
    """One thing to learn: `messages` of a chat or, for continued pretraining, `text`."""

    where: str
    messages: tuple[Message, ...] = ()
    text: str | None = None

    @cached_property
    def key(self) -> str:
        """Equal for two rows that say the same."""
        content = self.text if self.text is not None else self.messages
        return json.dumps(content, sort_keys=True, ensure_ascii=False)


def to_examples(
    rows: Iterable[Row], task: str, shape: str = "auto", columns: dict[str, str] | None = None
) -> list[Example]:
    """Read every row in one shape.

    `task`: chat or text. `shape`: auto, or a key of REQUIRED. `columns`: our name -> the row's.
    Raises UserError, naming the row, for an unknown shape, a missing column, a wrong kind of
    value, or rows of different shapes in one source.
    """
    examples = []
    first: tuple[str, str] | None = None
    for row in rows:
        content = _renamed(row, columns)
        found = shape if shape != "auto" else _recognise(row.where, content)
        if first is None:
            first = (found, row.where)
        elif found != first[0]:
            raise UserError(
                f"{row.where} is of the shape {found}, {first[1]} of the shape {first[0]}; "
                "put rows of different shapes in files of their own"
            )
        if (found == "text") != (task == "text"):
            raise UserError(f"{row.where} is of the shape {found}, which does not fit task: {task}")
        examples.append(_READERS[found](row.where, content))
    return examples


def to_prompts(rows: Iterable[Row]) -> list[Example]:
    """Chats up to where an answer begins: rows of `messages`, `prompt` or `instruction`, whose own
    last answer, if they have one, is left out.

    Raises UserError, naming the row, where there is none of these or a value of a wrong kind.
    """
    found = []
    for row in rows:
        unanswered = {"completion": "", "output": ""} | row.content
        shape = _recognise(row.where, unanswered)
        if shape == "text":
            raise UserError(f"{row.where} has only text; a prompt is a column named prompt")
        messages = _READERS[shape](row.where, unanswered).messages
        if messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        if not messages:
            raise UserError(f"{row.where} asks nothing: its only message is an answer")
        found.append(Example(row.where, messages))
    return found


def _renamed(row: Row, columns: dict[str, str] | None) -> dict[str, Any]:
    content = dict(row.content)
    for ours, theirs in (columns or {}).items():
        if theirs not in content:
            have = ", ".join(map(str, row.content))
            raise UserError(f"{row.where} has no column {theirs!r} (data columns); it has {have}")
        content[ours] = content.pop(theirs)
    return content


def _recognise(where: str, content: dict[str, Any]) -> str:
    for shape, needed in REQUIRED.items():
        if all(name in content for name in needed):
            return shape
    have = ", ".join(map(str, content)) or "no columns"
    raise UserError(
        f"{where} is of no known shape (it has {have}); known are messages, prompt + completion, "
        "instruction + output, text: rename with columns, as in columns: {prompt: question}"
    )


def _string(where: str, content: dict[str, Any], name: str, default: str | None = None) -> str:
    value = content.get(name, default)
    value = default if value is None else value
    if not isinstance(value, str):
        raise UserError(f"{where}: {name!r} must be text, and is {value!r}")
    return value


def _messages(where: str, content: dict[str, Any]) -> Example:
    messages = content.get("messages")
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: 'messages' must be a list with at least one message")
    read = []
    for number, message in enumerate(messages, start=1):
        place = f"{where}, message {number}"
        if not isinstance(message, dict):
            raise UserError(f"{place} must be an object with role and content")
        extra = {k for k, v in message.items() if v is not None} - {"role", "content"}
        if extra:
            raise UserError(f"{place}: {min(extra)!r} is not supported; keep role and content")
        read.append({name: _string(place, message, name) for name in ("role", "content")})
    return Example(where, tuple(read))


def _prompt_completion(where: str, content: dict[str, Any]) -> Example:
    return _exchange(where, content, _string(where, content, "prompt"), "completion")


def _alpaca(where: str, content: dict[str, Any]) -> Example:
    instruction = _string(where, content, "instruction")
    extra = _string(where, content, "input", "")
    prompt = f"{instruction}\n\n{extra}" if extra else instruction
    return _exchange(where, content, prompt, "output")


def _exchange(where: str, content: dict[str, Any], prompt: str, answer: str) -> Example:
    system = _string(where, content, "system", "")
    opening = ({"role": "system", "content": system},) if system else ()
    return Example(
        where,
        (
            *opening,
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": _string(where, content, answer)},
        ),
    )


def _text(where: str, content: dict[str, Any]) -> Example:
    return Example(where, text=_string(where, content, "text"))


_READERS = {
    "messages": _messages,
    "prompt_completion": _prompt_completion,
    "alpaca": _alpaca,
    "text": _text,
}
