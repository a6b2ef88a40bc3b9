"""The part of Go's template language that an Ollama TEMPLATE of ours needs, carried out.

It exists to prove a template: what it makes of a chat must be what the chat template of the
tokenizer makes of it. Meanings: Go's text/template and Ollama's docs/template.md.

Actions: {{ range $i, $_ := .Messages }}, {{ if EXPRESSION }}, {{ else }}, {{ end }} and a value; a
value is .Field, $name, a number, a "text" or one of eq, ne, and, or with values. Text is as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

_ACTION = re.compile(r"\{\{(.*?)\}\}", re.DOTALL)
_WORD = re.compile(r'\(|\)|"[^"]*"|[^\s()]+')
_RANGE = re.compile(r"range (\$\w+), (\$\w+) := \.(\w+)")


@dataclass
class _Node:
    """An action and what is inside it; `kind` is text, value, if or range."""

    kind: str
    what: str
    inside: list[_Node] = field(default_factory=list)
    otherwise: list[_Node] = field(default_factory=list)


def rendered(template: str, messages: Sequence[dict[str, str]]) -> str:
    """What a template makes of a chat. Raises ValueError for what is not built."""
    chat = [{"Role": m["role"], "Content": m["content"]} for m in messages]
    nodes, rest = _parsed(list(_pieces(template)))
    if rest:
        raise ValueError(f"{{{{ {rest[0][1]} }}}} closes nothing")
    return _text(nodes, {"Messages": chat}, {})


def _pieces(template: str) -> Iterator[tuple[str, str]]:
    at = 0
    for match in _ACTION.finditer(template):
        yield "text", template[at : match.start()]
        yield "action", match[1].strip()
        at = match.end()
    yield "text", template[at:]


def _parsed(pieces: list[tuple[str, str]]) -> tuple[list[_Node], list[tuple[str, str]]]:
    """Nodes up to the end of the block, and the pieces from there on."""
    nodes: list[_Node] = []
    while pieces:
        kind, what = pieces[0]
        if kind == "action" and what in ("end", "else"):
            break
        pieces = pieces[1:]
        word = what.partition(" ")[0]
        if kind == "action" and word in ("if", "range"):
            node = _Node(word, what)
            node.inside, pieces = _parsed(pieces)
            if pieces and pieces[0][1] == "else":
                node.otherwise, pieces = _parsed(pieces[1:])
            if not pieces:
                raise ValueError(f"{{{{ {what} }}}} has no end")
            pieces = pieces[1:]
        else:
            node = _Node("text" if kind == "text" else "value", what)
        nodes.append(node)
    return nodes, pieces


def _text(nodes: Sequence[_Node], dot: dict[str, Any], names: dict[str, Any]) -> str:
    return "".join(_said(node, dot, names) for node in nodes)


def _said(node: _Node, dot: dict[str, Any], names: dict[str, Any]) -> str:
    if node.kind == "text":
        return node.what
    if node.kind == "value":
        return str(_value(node.what, dot, names))
    if node.kind == "if":
        holds = _value(node.what.removeprefix("if "), dot, names)
        return _text(node.inside if holds else node.otherwise, dot, names)
    match = _RANGE.fullmatch(node.what)
    if match is None:
        raise ValueError(f"{{{{ {node.what} }}}} is not built")
    index, element, over = match.groups()
    return "".join(
        _text(node.inside, one, names | {index: at, element: one})
        for at, one in enumerate(dot[over])
    )


def _value(expression: str, dot: dict[str, Any], names: dict[str, Any]) -> Any:
    words = _WORD.findall(expression)
    value, rest = _call(words, dot, names)
    if rest:
        raise ValueError(f"{expression!r} goes on after its end")
    return value


def _call(words: list[str], dot: dict[str, Any], names: dict[str, Any]) -> tuple[Any, list[str]]:
    """The value of a function with its arguments, or of one word, and the words after it."""
    function, rest = words[0], words[1:]
    if function not in ("eq", "ne", "and", "or"):
        return _operand(words, dot, names)
    given = []
    while rest and rest[0] != ")":
        value, rest = _operand(rest, dot, names)
        given.append(value)
    if function == "and":
        return all(given), rest
    if function == "or":
        return any(given), rest
    return (given[0] == given[1]) == (function == "eq"), rest


def _operand(words: list[str], dot: dict[str, Any], names: dict[str, Any]) -> tuple[Any, list[str]]:
    word, rest = words[0], words[1:]
    if word == "(":
        value, rest = _call(rest, dot, names)
        if not rest or rest[0] != ")":
            raise ValueError("a parenthesis is not closed")
        return value, rest[1:]
    if word.startswith('"'):
        return word[1:-1], rest
    if word.startswith("$"):
        return names[word], rest
    if word.startswith("."):
        return dot[word[1:]], rest
    if word.isdigit():
        return int(word), rest
    raise ValueError(f"{word!r} is not built")
