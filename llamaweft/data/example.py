"""What a row says, whatever shape it had: a text or a chat, and what is learnt from it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

_JSON = json.JSONEncoder(sort_keys=True, ensure_ascii=False, check_circular=False)

Message = dict[str, Any]
"""role: system, user, assistant or tool. content: text. Where given, `tool_calls` (of an answer, in
OpenAI's form, with arguments as an object), `tool_call_id` (of a tool), `name` and `weight`."""


@dataclass(frozen=True)
class Labels:
    """The classes of a text, or of a pair of texts; the first text is `Example.text`.

    labels: as given, text, number or true/false; of regression one number. many: whether the row
    gives a list, so that any number of classes may hold. text_pair: the second text of a pair.
    """

    labels: tuple[str | int | float, ...]
    many: bool = False
    text_pair: str | None = None


@dataclass(frozen=True)
class Tags:
    """A class for each word. tokens: the words. tags: as given, as many as tokens."""

    tokens: tuple[str, ...]
    tags: tuple[str | int, ...]


@dataclass(frozen=True)
class Preference:
    """Two ways to go on from `Example.messages`, of which the first is the better one. plain:
    whether all of it is text, one piece after the other, and no chat."""

    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    plain: bool = False


@dataclass(frozen=True)
class Rating:
    """One way to go on from `Example.messages`, and whether it is wanted."""

    completion: tuple[Message, ...]
    wanted: bool


@dataclass(frozen=True)
class Span:
    """Where the answers to a question stand: `answers[i]` begins at character `starts[i]` of
    `context`. No answers: the context does not say."""

    question: str
    context: str
    answers: tuple[str, ...]
    starts: tuple[int, ...]


Target = Labels | Tags | Preference | Rating | Span
_TARGETS = {kind.__name__: kind for kind in (Labels, Tags, Preference, Rating, Span)}


@dataclass(frozen=True)
class Example:
    """One thing to learn.

    where: file and line. messages: a chat, or the prompt of a preference or rating. text: for
    continued pretraining and classification. tools: functions that the chat offers, in OpenAI's
    form. target: what tasks other than chat and text learn.
    """

    where: str
    messages: tuple[Message, ...] = ()
    text: str | None = None
    tools: tuple[dict[str, Any], ...] = ()
    target: Target | None = None

    @cached_property
    def key(self) -> str:
        """Equal for two rows that say the same, wherever they stand and however they weigh."""
        said: Any = self.messages if self.text is None else self.text
        if any("weight" in message for message in self.messages):
            said = [{k: v for k, v in m.items() if k != "weight"} for m in self.messages]
        if self.tools or self.target is not None:
            target = self.target and [type(self.target).__name__, vars(self.target)]
            said = {"said": said, "tools": self.tools, "target": target}
        return _JSON.encode(said)

    @classmethod
    def from_key(cls, where: str, key: str) -> Example:
        """The example whose key that is, without the weights of its messages."""
        said, tools, target = json.loads(key), [], None
        if isinstance(said, dict):
            said, tools, target = said["said"], said["tools"], said["target"]
        if target is not None:
            kind, fields = target
            lists = {name: tuple(value) for name, value in fields.items() if type(value) is list}
            target = _TARGETS[kind](**fields | lists)
        if isinstance(said, str):
            return cls(where, text=said, tools=tuple(tools), target=target)
        return cls(where, tuple(said), tools=tuple(tools), target=target)
