"""Cleaning: steps that look at one row, applied in order, each with a count of what it did.

A step takes an example and gives the same one back, a changed one, or None for a row that goes.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, ClassVar, Literal, Protocol

from llamaweft.data.example import Example, Message, Preference
from llamaweft.errors import UserError

EXAMPLES_SHOWN = 5
EXCERPT_CHARACTERS = 80
REGEX_SECONDS = 2.0
"""A pattern with nested repeats can take years on one row; no sound one takes this long."""
LANGUAGE_CHARACTERS = 1000
"""A language is told by the beginning of a text; more of it costs time and changes nothing."""


class Step(Protocol):
    """One step of `data.clean`; `name` is its name in the recipe."""

    @property
    def name(self) -> str: ...
    def __call__(self, example: Example) -> Example | None: ...


@dataclass
class Removed:
    """What a step did. count: rows that it removed. changed: rows that it changed.
    examples: where the first of either are, each with the beginning of its text."""

    step: str
    count: int = 0
    changed: int = 0
    examples: list[str] = field(default_factory=list)

    def note(self, example: Example) -> None:
        if len(self.examples) < EXAMPLES_SHOWN:
            self.examples.append(f"{example.where}: {excerpt(example)}")


class Cleaner:
    """The steps in order. `removed` holds their counts, one for each step."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self.removed = [Removed(step.name) for step in steps]
        self._steps = list(steps)

    def __call__(self, example: Example) -> Example | None:
        """The example as the steps leave it, or None where one of them removes it."""
        for step, removed in zip(self._steps, self.removed, strict=True):
            result = step(example)
            if result is None:
                removed.count += 1
                removed.note(example)
                return None
            if result is not example:
                removed.changed += 1
                removed.note(example)
            example = result
        return example


def texts_of(example: Example, roles: Sequence[str] | None = None) -> list[str]:
    """The text of a row, or what each message of a chat says (of these roles only, when given).

    What a message says is its content, and the functions that it calls as JSON. Of a preference
    both sides follow the prompt. What the target of another task holds is not among it.
    """
    if example.text is not None:
        return [example.text]
    messages = example.messages
    if isinstance(example.target, Preference):
        messages += (*example.target.chosen, *example.target.rejected)
    return [_said(m) for m in messages if roles is None or m["role"] in roles]


def excerpt(example: Example) -> str:
    """The beginning of a row's text, on one line."""
    beginning = " ".join(text[:EXCERPT_CHARACTERS] for text in texts_of(example))
    line = " ".join(beginning.split())
    return line if len(line) <= EXCERPT_CHARACTERS else line[: EXCERPT_CHARACTERS - 1] + "…"


def _said(message: Message) -> str:
    calls: Any = message.get("tool_calls")
    said = [message.get("content") or "", json.dumps(calls, ensure_ascii=False) if calls else ""]
    return "\n".join(part for part in said if part)


@dataclass(frozen=True)
class Normalize:
    """Write every text in one Unicode form, NFC or NFKC."""

    form: Literal["NFC", "NFKC"] = "NFC"
    name: ClassVar[str] = "normalize"

    def __call__(self, example: Example) -> Example:
        text: Any = self._normalized(example.text)
        messages: Any = tuple(self._normalized(message) for message in example.messages)
        target = example.target
        if isinstance(target, Preference):
            chosen, rejected = map(self._normalized, (list(target.chosen), list(target.rejected)))
            target = Preference(tuple(chosen), tuple(rejected), target.plain)
        if (text, messages, target) == (example.text, example.messages, example.target):
            return example
        return replace(example, text=text, messages=messages, target=target)

    def _normalized(self, value: Any) -> Any:
        """Whatever a message holds; its calls of functions are objects in lists."""
        if isinstance(value, str):
            return unicodedata.normalize(self.form, value)
        if isinstance(value, list):
            return [self._normalized(part) for part in value]
        if isinstance(value, dict):
            return {key: self._normalized(part) for key, part in value.items()}
        return value


@dataclass(frozen=True)
class Empty:
    """Removes rows whose text, or whose every answer, has fewer characters, white space at both
    ends not counted; so also a chat without an answer. A call of a function is an answer."""

    min_characters: int = 1
    name: ClassVar[str] = "empty"

    def __call__(self, example: Example) -> Example | None:
        answers = texts_of(example, ["assistant"])
        said = any(len(answer.strip()) >= self.min_characters for answer in answers)
        return example if said else None


@dataclass(frozen=True)
class Length:
    """Removes rows whose whole text has fewer or more characters than these bounds."""

    min_characters: int | None = None
    max_characters: int | None = None
    name: ClassVar[str] = "length"

    def __call__(self, example: Example) -> Example | None:
        characters = sum(map(len, texts_of(example)))
        short = self.min_characters is not None and characters < self.min_characters
        long = self.max_characters is not None and characters > self.max_characters
        return None if short or long else example


class Regex:
    """Removes rows in which `drop` is found, and rows in which `keep` is not.

    Patterns are those of Python's `re`, searched in each message by itself. Raises UserError for a
    pattern that is not valid, and at a row that it runs out of time on.
    """

    name: ClassVar[str] = "regex"

    def __init__(self, drop: str | None = None, keep: str | None = None) -> None:
        self._drop = None if drop is None else _compiled(drop)
        self._keep = None if keep is None else _compiled(keep)

    def __call__(self, example: Example) -> Example | None:
        if self._drop is not None and _is_found(self._drop, example):
            return None
        if self._keep is not None and not _is_found(self._keep, example):
            return None
        return example


def _compiled(pattern: str) -> Any:
    import regex  # unlike `re`, it can stop when its time is up

    try:
        return regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError, MemoryError) as error:
        raise UserError(
            f"data.clean: the pattern {pattern!r} of the step regex is not a valid regular "
            f"expression ({error}); mend it"
        ) from None


def _is_found(pattern: Any, example: Example) -> bool:
    try:
        return any(pattern.search(text, timeout=REGEX_SECONDS) for text in texts_of(example))
    except TimeoutError:
        raise UserError(
            f"{example.where}: the pattern {pattern.pattern!r} of the step regex (data.clean) "
            f"takes longer than {REGEX_SECONDS:g} seconds on this row; write it without repeats "
            "inside repeats"
        ) from None


class Language:
    """Keeps rows in these languages (ISO 639-1), told by what user and assistant say.

    A row without letters has no language and stays. Raises UserError for a code that cannot be
    told, and when the library that tells is not installed.
    """

    name: ClassVar[str] = "language"

    def __init__(self, keep: Sequence[str]) -> None:
        self._identifier = _identifier()
        self._keep = frozenset(keep)
        known = self._identifier.labels
        for code in keep:
            if code not in known:
                raise UserError(
                    f"data.clean: the step language cannot tell {code!r}; it knows "
                    f"{' '.join(sorted(known))}"
                )

    def __call__(self, example: Example) -> Example | None:
        text = " ".join(texts_of(example, ["user", "assistant"]))[:LANGUAGE_CHARACTERS]
        if not any(character.isalpha() for character in text):
            return example
        return example if self._identifier.classify(text)[0] in self._keep else None


@lru_cache(maxsize=1)
def _identifier() -> Any:
    """The model of py3langid, among the languages with a code in ISO 639-1: it knows some others,
    and takes short English sentences for them."""
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise UserError(
            "data.clean: the step language needs py3langid; install it with "
            "pip install 'llamaweft[clean]'"
        ) from None
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE)
    labels = identifier.labels
    identifier.set_languages([code for code in labels if len(code) == 2])
    return identifier


ROW_STEPS = {step.name: step for step in (Normalize, Empty, Length, Regex, Language)}
"""The steps that look at one row, by their names in the recipe; its other keys are arguments."""
