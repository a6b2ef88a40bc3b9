"""Shapes that are chats: their columns as messages."""

from __future__ import annotations

from typing import Any

from llamaweft.data.example import Example, Message, Span, Target
from llamaweft.data.messages import read_messages, read_tools
from llamaweft.data.values import all_of, either, shown, string
from llamaweft.errors import UserError


def chat(
    where: str,
    content: dict[str, Any],
    messages: tuple[Message, ...],
    tools: tuple[dict[str, Any], ...] = (),
    target: Target | None = None,
) -> Example:
    """A chat, with the column `system` before it."""
    system = string(where, content, "system", default="")
    if system and messages and messages[0]["role"] == "system":
        raise UserError(f"{where} has a column system and a system message; keep one of them")
    opening = ({"role": "system", "content": system},) if system else ()
    return Example(where, (*opening, *messages), tools=tools, target=target)


def _said(role: str, content: str) -> tuple[Message, ...]:
    return ({"role": role, "content": content},)


def side(where: str, content: dict[str, Any], name: str, role: str) -> tuple[Message, ...]:
    """A column that holds messages, or text that `role` says."""
    if isinstance(content.get(name), list):
        return read_messages(where, name, content[name])
    return _said(role, string(where, content, name))


def messages(where: str, content: dict[str, Any]) -> Example:
    said = read_messages(where, "messages", content.get("messages"))
    return chat(where, content, said, read_tools(where, content))


def sharegpt(where: str, content: dict[str, Any]) -> Example:
    name, value = either(content, "conversations", "conversation")
    return chat(where, content, read_messages(where, name, value), read_tools(where, content))


def prompt_completion(where: str, content: dict[str, Any]) -> Example:
    prompt = side(where, content, "prompt", "user")
    completion = side(where, content, "completion", "assistant")
    return chat(where, content, prompt + completion, read_tools(where, content))


def alpaca(where: str, content: dict[str, Any]) -> Example:
    earlier: list[Message] = []
    history = content.get("history") or []
    if not isinstance(history, list):
        raise UserError(f"{where}: 'history' must be a list of pairs, and is {shown(history)}")
    for number, pair in enumerate(history, start=1):
        if not isinstance(pair, list) or [type(text) for text in pair] != [str, str]:
            raise UserError(
                f"{where}: pair {number} of 'history' must be a list of a question and an answer"
            )
        earlier += (*_said("user", pair[0]), *_said("assistant", pair[1]))
    instruction = string(where, content, "instruction")
    extra = string(where, content, "input", default="")
    prompt = f"{instruction}\n\n{extra}" if extra else instruction
    answer = _said("assistant", string(where, content, "output"))
    return chat(where, content, (*earlier, *_said("user", prompt), *answer))


def question_answer(where: str, content: dict[str, Any]) -> Example:
    context = string(where, content, "context", default="")
    question = string(where, content, "question", "query")
    prompt = _said("user", f"{context}\n\n{question}" if context else question)
    answer = string(where, content, "answer", "response")
    return chat(where, content, prompt + _said("assistant", answer))


def squad(where: str, content: dict[str, Any]) -> Example:
    context = string(where, content, "context")
    question = string(where, content, "question")
    answers = content.get("answers")
    answers = answers if isinstance(answers, dict) else {}
    texts, starts = answers.get("text"), answers.get("answer_start")
    if not all_of(texts, str) or not all_of(starts, int) or len(texts) != len(starts):
        raise UserError(
            f"{where}: 'answers' must be an object with two lists of the same length: text, and "
            "answer_start with the character at which each begins"
        )
    for text, start in zip(texts, starts, strict=True):
        if start < 0 or not context.startswith(text, start):
            raise UserError(
                f"{where}: the answer {shown(text)} is not at character {start} of the context; "
                "mend answer_start"
            )
    said = _said("user", f"{context}\n\n{question}")
    if texts:
        said += _said("assistant", texts[0])
    span = Span(question, context, tuple(texts), tuple(starts))
    return chat(where, content, said, target=span)


def summary(where: str, content: dict[str, Any]) -> Example:
    document = string(where, content, "document", "article")
    answer = string(where, content, "summary", "highlights")
    return chat(where, content, _said("user", document) + _said("assistant", answer))


def dialogue(where: str, content: dict[str, Any]) -> Example:
    name, turns = either(content, "dialog", "dialogue", "turns")
    if all_of(turns, str):
        roles = ("user", "assistant")
        turns = [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]
    return chat(where, content, read_messages(where, name, turns))
