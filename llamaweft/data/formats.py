"""From rows to examples: the shape of a source is recognised, or named, or mapped.

Rows stream: nothing but the row at hand is kept.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from llamaweft.data.example import Example, Preference, Span
from llamaweft.data.shapes import SHAPES, TASK_SHAPES, named, no_shape, read_shape, shapes_of
from llamaweft.errors import UserError

if TYPE_CHECKING:
    from llamaweft.data.sources import BadRows, Row

LOOK_AHEAD_ROWS = 10_000
"""Rows that are looked through for further shapes once a file has two."""

_UNANSWERED = {
    "completion": "",
    "output": "",
    "answer": "",
    "answers": {"text": [], "answer_start": []},
    "summary": "",
}
"""What a row of prompts need not have."""


@dataclass
class ShapeOfFile:
    """The file that is being read. first: its shape, and the first row that has it."""

    file: str | None = None
    first: dict[str, str] = field(default_factory=dict)


def to_examples(
    rows: Iterable[Row],
    task: str,
    shape: str = "auto",
    columns: dict[str, str] | None = None,
    bad: BadRows | None = None,
    before: ShapeOfFile | None = None,
) -> Iterator[Example]:
    """Read every row of a source, one by one.

    task: chat or text. shape: auto, or a key of SHAPES. columns: our name -> the row's. bad: what
    happens to a row that cannot be read; left out, it is an error. before: the shape of the rows
    that were read in another run, which is kept up to date.

    Raises UserError, naming the row, for such a row, for a shape that the task does not take, and
    for a file whose rows are of several shapes; naming the column for one that no shape has.
    """
    _check(shape, columns)
    rows = iter(rows)
    known = before or ShapeOfFile()
    for row in rows:
        where = row.where
        try:
            content = _renamed(row, columns)
            fitting = shapes_of(where, content) if shape == "auto" else (shape,)
        except UserError as error:
            _found(bad, error)
            continue
        if row.name != known.file:
            known.file, known.first = row.name, {}
        known.first.setdefault(fitting[0], where)
        if len(known.first) > 1:
            raise _several_shapes(row.name, known.first, rows, columns)
        if fitting[0] not in TASK_SHAPES[task]:
            raise _misfit(where, fitting, task)
        try:
            example = _learnable(read_shape(fitting[0], where, content), task)
        except UserError as error:
            _found(bad, error)
            continue
        yield example


def to_prompts(rows: Iterable[Row], bad: BadRows | None = None) -> list[Example]:
    """Chats up to where an answer begins: rows of any shape that `task: chat` takes, whose own last
    answer, if they have one, is left out. bad: as in `to_examples`.

    Raises UserError, naming the row, where nothing is asked or for a value of a wrong kind.
    """
    found = []
    for row in rows:
        try:
            found.append(_prompt(row))
        except UserError as error:
            _found(bad, error)
    return found


def _prompt(row: Row) -> Example:
    given = {name: value for name, value in row.content.items() if value is not None}
    content = _UNANSWERED | given
    chats = [name for name in TASK_SHAPES["chat"] if SHAPES[name].fits(content)]
    if not chats:
        if "text" in given:
            raise UserError(f"{row.where} has only text; a prompt is a column named prompt")
        raise no_shape(row.where, row.content, TASK_SHAPES["chat"])
    example = read_shape(chats[0], row.where, content)
    messages = example.messages
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages:
        raise UserError(f"{row.where} asks nothing: its only message is an answer")
    return Example(row.where, messages, tools=example.tools)


_UNTOLD: dict[str, tuple[tuple[tuple[str, ...], ...], dict[str, Any]]] = {
    "classification": ((("text", "sentence"),), {"label": 0, "labels": None}),
    "tagging": ((("tokens",),), {"tags": [], "ner_tags": None}),
    "squad": ((("question",), ("context",)), {"answers": {"text": [], "answer_start": []}}),
}
"""Of shapes that a head learns from: what it reads, and nothing where it is told what to say."""


def to_inputs(rows: Iterable[Row], task: str) -> list[Example]:
    """What the head of `task` reads of each row, and never what the row says that it should say:
    the label is left out, whatever it is.

    Raises UserError, naming the row, for a missing column or a value of a wrong kind.
    """
    (shape,) = TASK_SHAPES[task]
    needed, untold = _UNTOLD[shape]
    found = []
    for row in rows:
        content = row.content | untold
        for names in needed:
            if all(row.content.get(name) is None for name in names):
                raise UserError(
                    f"{row.where} has no {' or '.join(names)}, which task: {task} reads; it has "
                    f"{named(row.content)}"
                )
        if shape == "tagging" and isinstance(content["tokens"], list):
            content["tags"] = [0] * len(content["tokens"])
        found.append(_learnable(read_shape(shape, row.where, content), task))
    return found


def _check(shape: str, columns: dict[str, str] | None) -> None:
    """Raises UserError for a shape, or a column of ours, that is not there."""
    if shape != "auto" and shape not in SHAPES:
        raise UserError(f"format: {shape!r} is no shape; known are auto, {', '.join(SHAPES)}")
    shapes = SHAPES.values() if shape == "auto" else (SHAPES[shape],)
    ours = {name for known in shapes for name in chain(*known.columns, known.optional)}
    for name in columns or ():
        if name not in ours:
            nearest = difflib.get_close_matches(name, sorted(ours), n=1, cutoff=0)[0]
            which = "any shape" if shape == "auto" else f"the shape {shape}"
            raise UserError(
                f"columns: {name!r} is no column of {which}; the nearest is {nearest!r}"
            )


def _renamed(row: Row, columns: dict[str, str] | None) -> dict[str, Any]:
    if not columns:
        return row.content
    for name in columns.values():
        if name not in row.content:
            raise UserError(
                f"{row.where} has no column {name!r} (data columns); it has {named(row.content)}"
            )
    theirs = set(columns.values())
    kept = {name: value for name, value in row.content.items() if name not in theirs}
    return kept | {ours: row.content[name] for ours, name in columns.items()}


def _learnable(example: Example, task: str) -> Example:
    """What a task learns of an example: chat and text its words, the others its target, and of a
    preference both."""
    if isinstance(example.target, Preference):
        return example
    if task not in ("chat", "text"):
        return replace(example, messages=()) if example.messages else example
    if isinstance(example.target, Span) and not example.target.answers:
        raise UserError(
            f"{example.where} has no answer, which task: {task} cannot learn; "
            "give it one or remove the row"
        )
    return example if example.target is None else replace(example, target=None)


def _several_shapes(
    file: str, first: dict[str, str], rest: Iterator[Row], columns: dict[str, str] | None
) -> UserError:
    """Names the first row of each shape, also of those that come up soon."""
    for row in islice(rest, LOOK_AHEAD_ROWS):
        if row.name != file:
            break
        try:
            first.setdefault(shapes_of(row.where, _renamed(row, columns))[0], row.where)
        except UserError:
            continue  # of no shape
    found = ", ".join(f"{where} of the shape {shape}" for shape, where in first.items())
    return UserError(
        f"{file} has rows of several shapes: {found}; put each shape in a file of its own"
    )


def _misfit(where: str, fitting: tuple[str, ...], task: str) -> UserError:
    takes = TASK_SHAPES[task]
    others = [shape for shape in fitting if shape in takes]
    advice = f"; it can be read as one with format: {others[0]}" if others else ""
    return UserError(
        f"{where} is of the shape {fitting[0]}, which does not fit task: {task}, which takes "
        f"{', '.join(takes)}{advice}"
    )


def _found(bad: BadRows | None, error: UserError) -> None:
    if bad is None:
        raise error
    bad.found(str(error))
