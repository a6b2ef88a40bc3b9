"""Values of a row's columns: of the kind that a shape needs, or an error that names the row."""

from __future__ import annotations

import json
from typing import Any, TypeGuard

from llamaweft.errors import UserError


def string(where: str, content: dict[str, Any], *names: str, default: str | None = None) -> str:
    """The text under the first of `names` that has a value. Raises UserError for another kind."""
    name = first_given(content, names)
    value = content.get(name)
    value = default if value is None else value
    if not isinstance(value, str):
        raise UserError(f"{where}: {name!r} must be text, and is {shown(value)}")
    return value


def from_json(where: str, name: str, value: str) -> Any:
    """What JSON inside a column says. Raises UserError where it is not valid."""
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise UserError(f"{where}: {name!r} is not valid JSON: {shown(value)}; mend it") from None


def shown(value: Any) -> str:
    """A value, or what it is, in a few words."""
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    if value is None:
        return "missing"
    text = repr(value[:50] if isinstance(value, str) else value)
    return text if len(text) <= 50 else f"{text[:47]}..."


def first_given(content: dict[str, Any], names: tuple[str, ...]) -> str:
    """The first of `names` that has a value; the first of all where none has."""
    return next((name for name in names if content.get(name) is not None), names[0])


def either(content: dict[str, Any], *names: str) -> tuple[str, Any]:
    """The first of `names` that has a value, and the value."""
    name = first_given(content, names)
    return name, content.get(name)


def all_of(values: Any, *kinds: type) -> TypeGuard[list[Any]]:
    """Whether `values` is a list and each of them exactly of one of the `kinds`."""
    return isinstance(values, list) and all(type(value) in kinds for value in values)
