"""The shapes of rows: the columns of each, and how they are read.

A shape that gives messages or text is learnt by `task: chat` or `task: text`; others also give a
target for the tasks that are named after it.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from llamaweft.data import chat_shapes, target_shapes
from llamaweft.data.example import Example
from llamaweft.errors import UserError


@dataclass(frozen=True)
class Shape:
    """columns: what a row must have, each with the other names it may have. optional: what it may
    have besides. read: (where, row) -> Example, or UserError for a value of a wrong kind."""

    columns: tuple[tuple[str, ...], ...]
    optional: tuple[str, ...]
    read: Callable[[str, dict[str, Any]], Example]

    def fits(self, names: Iterable[str]) -> bool:
        present = set(names)
        return all(not present.isdisjoint(column) for column in self.columns)

    def __str__(self) -> str:
        return " + ".join("/".join(column) for column in self.columns)


def read_shape(shape: str, where: str, content: dict[str, Any]) -> Example:
    """Read a row of a shape, one of SHAPES.

    Raises UserError, naming the row, for an unknown shape, a missing column or a value of a wrong
    kind.
    """
    known = SHAPES.get(shape)
    if known is None:
        raise UserError(f"{where}: {shape!r} is no shape; known are {', '.join(SHAPES)}")
    if not known.fits(content):
        raise UserError(
            f"{where} has not the columns of {shape} ({known}); it has {named(content)}: "
            "map names with columns, as in columns: {prompt: request}"
        )
    return known.read(where, content)


def shapes_of(where: str, content: dict[str, Any]) -> tuple[str, ...]:
    """The shapes whose columns a row has, in the order of SHAPES, of which the first counts.

    Columns without a value count only where there are no others. Raises UserError, naming the row,
    when there is no shape.
    """
    found = _fitting(tuple(name for name, value in content.items() if value is not None))
    found = found or _fitting(tuple(content))
    if not found:
        raise no_shape(where, content, SHAPES)
    return found


def no_shape(where: str, content: dict[str, Any], known: Iterable[str]) -> UserError:
    """The error for a row that is of none of the `known` shapes."""
    columns = "; ".join(f"{shape} ({SHAPES[shape]})" for shape in known)
    return UserError(
        f"{where} is of no known shape (it has {named(content)}); known are {columns}: "
        "map names with columns, as in columns: {prompt: request, completion: reply}"
    )


@lru_cache(maxsize=1024)
def _fitting(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name, shape in SHAPES.items() if shape.fits(names))


def named(content: dict[str, Any]) -> str:
    """The names of a row's columns, as far as a sentence has room for them."""
    return textwrap.shorten(", ".join(map(str, content)), 200, placeholder=" ...") or "no columns"


SHAPES = {
    "messages": Shape((("messages",),), ("system", "tools"), chat_shapes.messages),
    "sharegpt": Shape(
        (("conversations", "conversation"),), ("system", "tools"), chat_shapes.sharegpt
    ),
    "preference": Shape(
        (("chosen",), ("rejected",)), ("prompt", "system", "tools"), target_shapes.preference
    ),
    "rating": Shape(
        (("prompt",), ("completion",), ("label",)), ("system", "tools"), target_shapes.rating
    ),
    "prompt_completion": Shape(
        (("prompt",), ("completion",)), ("system", "tools"), chat_shapes.prompt_completion
    ),
    "alpaca": Shape(
        (("instruction",), ("output",)), ("input", "history", "system"), chat_shapes.alpaca
    ),
    "squad": Shape((("question",), ("context",), ("answers",)), ("system",), chat_shapes.squad),
    "question_answer": Shape(
        (("question", "query"), ("answer", "response")),
        ("context", "system"),
        chat_shapes.question_answer,
    ),
    "summary": Shape(
        (("document", "article"), ("summary", "highlights")), ("system",), chat_shapes.summary
    ),
    "dialogue": Shape((("dialog", "dialogue", "turns"),), ("system",), chat_shapes.dialogue),
    "tagging": Shape((("tokens",), ("tags", "ner_tags")), (), target_shapes.tagging),
    "classification": Shape(
        (("text", "sentence"), ("label", "labels")), ("text_pair",), target_shapes.classification
    ),
    "text": Shape((("text",),), (), target_shapes.text),
}
"""Every shape, in the order in which a row that has the columns of several is taken for one."""

TASK_SHAPES = {
    "chat": (
        "messages",
        "sharegpt",
        "prompt_completion",
        "alpaca",
        "squad",
        "question_answer",
        "summary",
        "dialogue",
    ),
    "text": ("text",),
    "sequence_classification": ("classification",),
    "regression": ("classification",),
    "token_classification": ("tagging",),
    "question_answering": ("squad",),
    "reward": ("preference",),
}
"""What each task learns from."""
