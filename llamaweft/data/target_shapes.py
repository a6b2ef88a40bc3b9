"""Shapes that are text, and those whose target other tasks learn."""

from __future__ import annotations

import math
from typing import Any

from llamaweft.data.chat_shapes import chat, side
from llamaweft.data.example import Example, Labels, Message, Preference, Rating, Tags
from llamaweft.data.messages import read_tools
from llamaweft.data.values import all_of, either, shown, string
from llamaweft.errors import UserError


def text(where: str, content: dict[str, Any]) -> Example:
    return Example(where, text=string(where, content, "text"))


def classification(where: str, content: dict[str, Any]) -> Example:
    name, value = either(content, "label", "labels")
    given = value if isinstance(value, list) else [value]
    if not all_of(given, str, int, bool, float) or not all(map(_finite, given)):
        raise UserError(
            f"{where}: {name!r} must be text, a number, true or false, or a list of these, "
            f"and is {shown(value)}"
        )
    first = string(where, content, "text", "sentence")
    pair = string(where, content, "text_pair") if content.get("text_pair") is not None else None
    return Example(where, text=first, target=Labels(tuple(given), isinstance(value, list), pair))


def _finite(value: object) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def tagging(where: str, content: dict[str, Any]) -> Example:
    name, tags = either(content, "tags", "ner_tags")
    tokens = content.get("tokens")
    if not tokens or not all_of(tokens, str):
        raise UserError(
            f"{where}: 'tokens' must be a list with at least one word, all of them text"
        )
    if blank := next((i for i, word in enumerate(tokens, 1) if not word.strip()), None):
        raise UserError(f"{where}: token {blank} is empty; remove it and its tag")
    if not all_of(tags, str, int):
        raise UserError(f"{where}: {name!r} must be a list of text or whole numbers")
    if len(tokens) != len(tags):
        raise UserError(
            f"{where} has {len(tokens)} tokens and {len(tags)} {name}; each token needs one"
        )
    return Example(where, target=Tags(tuple(tokens), tuple(tags)))


def preference(where: str, content: dict[str, Any]) -> Example:
    chosen = side(where, content, "chosen", "assistant")
    rejected = side(where, content, "rejected", "assistant")
    if _is_plain(content):
        return _plain_preference(where, string(where, content, "prompt", default=""), content)
    if content.get("prompt") is not None:
        prompt = side(where, content, "prompt", "user")
        # Some sets repeat the prompt at the beginning of both.
        repeated = chosen[: len(prompt)] == rejected[: len(prompt)] == prompt
        common = len(prompt) if repeated else 0
    else:
        common = _common(chosen, rejected)
        prompt = chosen[:common]
        if not prompt:
            raise UserError(f"{where}: chosen and rejected do not begin alike; add a column prompt")
    chosen, rejected = chosen[common:], rejected[common:]
    if chosen == rejected:
        raise UserError(f"{where}: chosen and rejected say the same; remove the row")
    if not all(side and side[0]["role"] == "assistant" for side in (chosen, rejected)):
        raise UserError(
            f"{where}: chosen and rejected must each go on from the prompt with an answer of the "
            "assistant"
        )
    return chat(where, content, prompt, read_tools(where, content), Preference(chosen, rejected))


def _is_plain(content: dict[str, Any]) -> bool:
    """Whether no column holds messages, or what only chats have."""
    texts = (content.get(name) for name in ("prompt", "chosen", "rejected"))
    of_chats = any(content.get(name) for name in ("system", "tools"))
    return not of_chats and not any(isinstance(text, list) for text in texts)


def _plain_preference(where: str, prompt: str, content: dict[str, Any]) -> Example:
    chosen, rejected = content["chosen"], content["rejected"]
    if chosen.startswith(prompt) and rejected.startswith(prompt):  # some sets repeat it
        chosen, rejected = chosen.removeprefix(prompt), rejected.removeprefix(prompt)
    if chosen == rejected:
        raise UserError(f"{where}: chosen and rejected say the same; remove the row")
    said = ({"role": "user", "content": prompt},) if prompt else ()
    better, worse = ({"role": "assistant", "content": text} for text in (chosen, rejected))
    return Example(where, said, target=Preference((better,), (worse,), plain=True))


def rating(where: str, content: dict[str, Any]) -> Example:
    prompt = side(where, content, "prompt", "user")
    completion = side(where, content, "completion", "assistant")
    label = content.get("label")
    wanted = _WANTED.get(str(label).lower()) if isinstance(label, str | int) else None
    if wanted is None:
        raise UserError(f"{where}: 'label' must be true or false, and is {shown(label)}")
    return chat(where, content, prompt, read_tools(where, content), Rating(completion, wanted))


_WANTED = {"true": True, "1": True, "false": False, "0": False}
"""As JSON, numbers and tables write it."""


def _common(a: tuple[Message, ...], b: tuple[Message, ...]) -> int:
    """How many messages both begin with."""
    for index, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return index
    return min(len(a), len(b))
