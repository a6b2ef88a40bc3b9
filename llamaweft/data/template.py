"""A chat as text, and where in that text each message and each answer stands.

Which characters are an answer is read from the template itself: from its `{% generation %}` marks
where it has them, else from what the text of a turn adds to the text before it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from llamaweft.data.example import Example, Message
from llamaweft.errors import UserError
from llamaweft.templates.render import TemplateFailedError, renderer

_OPEN, _CLOSE = "\ue000", "\ue001"
"""Private characters around what stands for a message's content in a skeleton."""
_STAND_IN = re.compile(f"{_OPEN}(\\d+){_CLOSE}")


class Span(NamedTuple):
    """Characters [start, end)."""

    start: int
    end: int


@dataclass(frozen=True)
class Rendered:
    """text: of the chat. contents: where each message's content stands in it, None where that
    cannot be told. answers: by index of the message, what the model writes in that turn, with the
    end of the turn, in one span or more. marked: whether the template itself marks the answers.
    pair: the second text, of a pair."""

    text: str
    contents: tuple[Span | None, ...] = ()
    answers: tuple[tuple[int, Span], ...] = ()
    marked: bool = False
    pair: str | None = None


@dataclass(frozen=True)
class RenderedPair(Rendered):
    """The texts of a preference, the better one first; `text` is both."""

    sides: tuple[Rendered, ...] = ()


class _Skeleton(NamedTuple):
    """What a template writes around the contents of messages with given roles: `literals` before,
    between and after them; boundaries of answers as (literal, characters into it)."""

    literals: tuple[str, ...]
    answers: tuple[tuple[int, tuple[int, int], tuple[int, int]], ...]


class ChatTemplate:
    """The chat template of a tokenizer. Raises UserError when there is none, or when it fails on
    the simplest chat."""

    def __init__(self, tokenizer: Any) -> None:
        if not tokenizer.chat_template:
            raise UserError(
                f"the tokenizer {tokenizer.name_or_path} has no chat template; use an instruct "
                "model, or set data.chat_template to llama3, llama3.1, chatml or a .jinja file"
            )
        self.tokenizer = tokenizer
        self._variables = dict(tokenizer.special_tokens_map)
        self._control = control_pattern(tokenizer)
        self._skeleton = lru_cache(maxsize=256)(self._make_skeleton)
        self._probe()

    def rendered(self, examples: Sequence[Example]) -> list[Rendered]:
        """Each chat as text, with its answers. Raises UserError, naming the row, when the template
        refuses its messages."""
        plain = [example for example in examples if not example.tools]
        try:
            texts = iter(self._render([e.messages for e in plain], None)) if plain else iter(())
        except TemplateFailedError as error:
            raise UserError(f"{plain[error.at].where}: the chat template {error}") from None
        found = []
        for example in examples:
            text, marks = (
                self.render(example.messages, example.where, example.tools)
                if (example.tools)
                else next(texts)
            )
            found.append(self._with_spans(example, text, marks))
        return found

    def prompt(self, example: Example) -> Rendered:
        """A chat up to where the assistant's answer begins."""
        text, _ = self.render(example.messages, example.where, example.tools, prompt=True)
        return Rendered(text, self._contents(example.messages, text))

    def render(
        self,
        messages: Sequence[Message],
        where: str,
        tools: Sequence[dict[str, Any]] = (),
        prompt: bool = False,
    ) -> tuple[str, list[Span]]:
        """The text, and what the template marks as generated. prompt: with the header of an answer
        at the end. Raises UserError when the template refuses these messages."""
        try:
            return self._render([messages], tools, prompt)[0]
        except TemplateFailedError as error:
            raise UserError(f"{where}: the chat template {error}") from None

    def _render(
        self, chats: Sequence[Sequence[Message]], tools: Sequence[Any] | None, prompt: bool = False
    ) -> list[tuple[str, list[Span]]]:
        written = renderer().render(
            self.tokenizer.get_chat_template(tools=list(tools) if tools else None),
            [[_shown(message) for message in chat] for chat in chats],
            variables=self._variables,
            tools=tools,
            prompt=prompt,
        )
        return [
            (text, [Span(start, end) for start, end in marks if start < end])
            for text, marks in written
        ]

    def _probe(self) -> None:
        """A chat of two words: what fails on it fails on everything."""
        chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            self._render([chat], None)
        except TemplateFailedError as error:
            raise UserError(
                f"the chat template of {self.tokenizer.name_or_path} fails on the simplest chat: "
                f"it {error}; set data.chat_template to another"
            ) from None

    # --- where the answers are -------------------------------------------------------------------

    def _with_spans(self, example: Example, text: str, marks: list[Span]) -> Rendered:
        messages = example.messages
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if marks and answers:
            contents = self._contents(messages, text)
            whose = _by_message(marks, answers, contents)
            return Rendered(text, contents, tuple(zip(whose, marks, strict=True)), marked=True)
        if not example.tools and all(message.keys() <= _PLAIN for message in messages):
            skeleton = self._skeleton(tuple(message["role"] for message in messages))
            if skeleton and (found := _fitted(skeleton, text, messages)):
                return found
        spans = self._by_turns(messages, text, example.where, example.tools)
        return Rendered(text, self._contents(messages, text), spans)

    def _make_skeleton(self, roles: tuple[str, ...]) -> _Skeleton | None:
        """None where the contents do not come through once each, in order."""
        chat = [{"role": role, "content": f"{_OPEN}{i}{_CLOSE}"} for i, role in enumerate(roles)]
        try:
            text, _ = self.render(chat, "")
            spans = self._by_turns(chat, text, "", ())
        except UserError:
            return None
        pieces = _STAND_IN.split(text)
        if pieces[1::2] != [str(i) for i in range(len(roles))]:
            return None
        starts = [match.end() for match in _STAND_IN.finditer(text)]

        def place(position: int) -> tuple[int, int] | None:
            literal = sum(start <= position for start in starts)
            offset = position - ([0, *starts][literal])
            return (literal, offset) if offset <= len(pieces[2 * literal]) else None

        answers = [(index, place(span.start), place(span.end)) for index, span in spans]
        if any(start is None or end is None for _, start, end in answers):
            return None
        return _Skeleton(tuple(pieces[::2]), tuple(answers))  # type: ignore[arg-type]

    def _by_turns(
        self, messages: Sequence[Message], text: str, where: str, tools: Sequence[dict[str, Any]]
    ) -> tuple[tuple[int, Span], ...]:
        """From the end of an answer's header, which the template writes as generation prompt, to
        the end of what the turn adds."""
        found = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            span = None
            try:
                before = (
                    self.render(messages[:index], where, tools, prompt=True)[0] if index else ""
                )
                after = self.render(messages[: index + 1], where, tools)[0]
            except UserError:  # the template wants what follows
                before, after = "", None
            if after is not None and text.startswith(after) and after.startswith(before):
                span = Span(len(before), len(after))
            else:
                span = self._by_change(messages, index, text, where, tools)
            if span is not None:
                found.append((index, span))
        return tuple(found)

    def _by_change(
        self,
        messages: Sequence[Message],
        index: int,
        text: str,
        where: str,
        tools: Sequence[dict[str, Any]],
    ) -> Span | None:
        """For a template that writes a turn differently once others follow: where the text
        changes when the answer does, from its header to the token that closes it. None where the
        answer is not written at all."""
        changed = list(messages)
        changed[index] = {"role": "assistant", "content": f"{_OPEN}0{_CLOSE}"}
        other = self.render(changed, where, tools)[0]
        if other == text:
            return None
        start = _common(text, other)
        stand_in = _STAND_IN.search(other)
        if stand_in is None:
            raise UserError(
                f"{where}: the tokens of an answer cannot be told in what the chat template "
                "writes; use train_on: all"
            )
        end = len(text) - (len(other) - stand_in.end())
        if other[stand_in.end() :] != text[max(end, start) :]:  # white space that was stripped
            end = len(text) - _common(text[start:][::-1], other[stand_in.end() :][::-1])
        header = self._header(messages[:index], where, tools)
        floor = text.rfind(header, 0, start) if header else -1
        if floor >= 0 and not self._control.search(text, floor + len(header), start):
            start = floor + len(header)
        closing = self._control.match(text, _skip_space(text, end))
        return Span(start, closing.end() if closing else end)

    def _header(
        self, before: Sequence[Message], where: str, tools: Sequence[dict[str, Any]]
    ) -> str:
        """What the template writes before an answer."""
        if not before:
            return ""
        try:
            plain = self.render(before, where, tools)[0]
            with_header = self.render(before, where, tools, prompt=True)[0]
        except UserError:
            return ""
        return with_header[_common(plain, with_header) :]

    def _contents(self, messages: Sequence[Message], text: str) -> tuple[Span | None, ...]:
        """Each content where it is found next, with the white space that the template left."""
        found: list[Span | None] = []
        at = 0
        for message in messages:
            content = message["content"].strip()
            start = text.find(content, at) if content else -1
            found.append(Span(start, start + len(content)) if start >= 0 else None)
            at = start + len(content) if start >= 0 else at
        return tuple(found)


def _by_message(
    marks: Sequence[Span], answers: Sequence[int], contents: Sequence[Span | None]
) -> list[int]:
    """The answer that each mark is a part of: a template may mark the end of a turn apart, or leave
    an answer unmarked."""
    if len(marks) == len(answers):
        return list(answers)
    begins = [(span.start, i) for i in answers if (span := contents[i]) is not None]
    return [
        max((found for found in begins if found[0] < mark.end), default=(0, answers[0]))[1]
        for mark in marks
    ]


_PLAIN = {"role", "content", "weight"}


def _shown(message: Message) -> Message:
    """Without what is ours."""
    if "weight" not in message:
        return message
    return {key: value for key, value in message.items() if key != "weight"}


def _fitted(skeleton: _Skeleton, text: str, messages: Sequence[Message]) -> Rendered | None:
    """The spans, when the text is the skeleton with these contents, as given or stripped."""
    for strip in (False, True):
        contents = [m["content"].strip() if strip else m["content"] for m in messages]
        starts, spans, at = [0], [], 0
        for literal, content in zip(skeleton.literals, contents, strict=False):
            at += len(literal)
            spans.append(Span(at, at + len(content)))
            at += len(content)
            starts.append(at)
        if len(text) != at + len(skeleton.literals[-1]):
            continue
        parts = [part for pair in zip(skeleton.literals, contents, strict=False) for part in pair]
        if "".join([*parts, skeleton.literals[-1]]) != text:
            continue
        answers = tuple(
            (index, Span(starts[a] + start, starts[b] + end))
            for index, (a, start), (b, end) in skeleton.answers
        )
        return Rendered(text, tuple(spans), answers)
    return None


def _common(a: str, b: str) -> int:
    """Characters that both begin with."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[:middle] == b[:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _skip_space(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def special_texts(tokenizer: Any) -> set[str]:
    """Control tokens as they are written."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return added | set(tokenizer.all_special_tokens)


def control_pattern(tokenizer: Any) -> re.Pattern[str]:
    """Finds the control tokens of a tokenizer in text."""
    names = sorted(special_texts(tokenizer), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names)) if names else r"(?!)")
