"""Rows whose target is no next token: what a head reads, and what it should say there.

A text becomes the tokens that `tokenizer(text)` gives, so that the exported model reads it alike. A
head reads the last token of a text, the last token of each word, or the tokens at which an answer
begins and ends.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from llamaweft.data.chat import Document, Tokenizer
from llamaweft.data.example import Example, Labels, Span, Tags
from llamaweft.data.template import Rendered, control_pattern
from llamaweft.data.tokens import TextTokenizer, Tokens
from llamaweft.errors import UserError

LABEL = np.dtype([("position", "<i4"), ("target", "<f4"), ("weight", "<f4")])
"""position: of the token that a head reads, in its document; LAST: the last one, however much of
the document is left. target: a class, a value, or for answers 0 where one begins and 1 where it
ends; of a pair 1 for the better text and -1 for the other. weight: what it counts; a document's
sum to 1, but for tags, which count each for itself."""

LAST = -1
NO_CLASS = -1
"""The target of a text of which no class holds."""

REWARD = "reward"
HEAD_TASKS = (
    *("sequence_classification", "regression", "token_classification", "question_answering"),
    REWARD,
)
"""Tasks with a head of their own; the others predict the next token."""


class TargetEncoder:
    """Tokenises examples for a head, as `Encoder` does for chats and text.

    classes: the labels that were seen, in the order in which they came; a class is its place.
    many: whether a text may be of several classes, once that is known.
    """

    def __init__(self, tokenizer: Tokenizer, task: str) -> None:
        self.tokenizer, self.task, self.train_on = tokenizer, task, ""
        self.core = tokenizer.backend_tokenizer
        self.classes: dict[str, int] = {}
        self.many: bool | None = None
        self._texts = TextTokenizer(self.core, control_pattern(tokenizer))
        self._read: Callable[[Example, Any], Document] = {
            "sequence_classification": self._classified,
            "regression": self._measured,
            "token_classification": self._tagged,
            "question_answering": self._answered,
        }[task]

    def __call__(self, examples: Sequence[Example]) -> list[Document]:
        """Raises UserError, naming the row, for a target that the tokens cannot carry."""
        texts = self.render(examples)
        return self.documents(examples, texts, self.tokenise(texts))

    @property
    def state(self) -> dict[str, Any]:
        """What is needed to go on with the same classes."""
        return {"classes": list(self.classes), "many": self.many}

    def restore(self, state: dict[str, Any]) -> None:
        self.classes = {label: place for place, label in enumerate(state.get("classes", []))}
        self.many = state.get("many")

    def render(self, examples: Sequence[Example]) -> list[Rendered]:
        """The text of each; that of a pair is two texts."""
        return [Rendered(first, pair=second) for first, second in map(_texts, examples)]

    def tokenise(self, texts: Sequence[Rendered]) -> list[Any]:
        """An encoding each, with the tokens that the tokenizer puts around a text."""
        given = [one.text if one.pair is None else (one.text, one.pair) for one in texts]
        return list(self.core.encode_batch(given, add_special_tokens=True))

    def documents(
        self, examples: Sequence[Example], texts: Sequence[Rendered], encodings: Sequence[Any]
    ) -> list[Document]:
        return [self._read(example, one) for example, one in zip(examples, encodings, strict=True)]

    def writes_control_tokens(self, text: Rendered) -> bool:
        return False  # a text is read as the tokenizer reads it

    def begins_with(self, token: int) -> bool:
        """Whether a text gets this token put before it."""
        return self.core.encode("a").ids[:1] == [token]

    @cached_property
    def special(self) -> set[int]:
        return set()

    # --- the tasks -------------------------------------------------------------------------------

    def _classified(self, example: Example, encoding: Any) -> Document:
        target = _target(example, Labels)
        if self.many not in (None, target.many):
            one, several = ("several", "one") if target.many else ("one", "several")
            raise UserError(
                f"{example.where} gives {one} of its classes and the rows before {several}; write "
                "a list in every row, or in none"
            )
        self.many = target.many
        if any(isinstance(label, float) for label in target.labels):
            raise UserError(
                f"{example.where}: the label {target.labels[0]} is no class; use task: regression "
                "for numbers"
            )
        found = sorted({self._class(label) for label in target.labels}) or [NO_CLASS]
        return self._at_last(example, encoding, found)

    def _measured(self, example: Example, encoding: Any) -> Document:
        target = _target(example, Labels)
        numbers = [v for v in target.labels if isinstance(v, int | float) and type(v) is not bool]
        if len(numbers) != 1 or target.many:
            raise UserError(f"{example.where}: task: regression needs one number as label")
        return self._at_last(example, encoding, numbers)

    def _at_last(self, example: Example, encoding: Any, targets: Sequence[float]) -> Document:
        if not encoding.ids:
            raise UserError(f"{example.where}: the text has no token; fill or remove it")
        return _document(example, encoding, [(LAST, t, 1 / len(targets)) for t in targets])

    def _tagged(self, example: Example, encoding: Any) -> Document:
        target = _target(example, Tags)
        tokens = _tokens(encoding)
        ends = np.cumsum([len(word) + 1 for word in target.tokens]) - 1
        last = [tokens.count_until(int(end)) - 1 for end in ends]
        for number, (before, place) in enumerate(pairwise([-1, *last]), start=1):
            if place <= before:
                raise UserError(
                    f"{example.where}: word {number} ({target.tokens[number - 1]!r}) ends in no "
                    "token of its own; join it with its neighbour, or remove it"
                )
        classes = [self._class(tag) for tag in target.tags]
        return _document(example, encoding, [(p, c, 1) for p, c in zip(last, classes, strict=True)])

    def _answered(self, example: Example, encoding: Any) -> Document:
        target = _target(example, Span)
        if not target.answers:  # the model says so at the first token
            return _document(example, encoding, [(0, 0, 0.5), (0, 1, 0.5)])
        if not target.answers[0].strip():
            raise UserError(
                f"{example.where}: the answer {target.answers[0]!r} says nothing; where the "
                "context does not say, leave text and answer_start empty"
            )
        start = target.starts[0]
        first = encoding.char_to_token(start, 1)
        last = encoding.char_to_token(start + len(target.answers[0].rstrip()) - 1, 1)
        if first is None or last is None:
            raise UserError(
                f"{example.where}: the answer {target.answers[0]!r} has no token of its own; give "
                "it without the white space around it"
            )
        return _document(example, encoding, [(first, 0, 0.5), (last, 1, 0.5)])

    def _class(self, label: str | int | float) -> int:
        return self.classes.setdefault(json.dumps(label), len(self.classes))


def ordered(labels: Sequence[str]) -> list[str]:
    """Labels (as JSON) in the order in which a head has them: numbers by size, text by letters."""
    values = {label: json.loads(label) for label in labels}
    if all(isinstance(value, int) for value in values.values()):
        return sorted(labels, key=lambda label: (values[label], label))
    return sorted(labels, key=lambda label: str(values[label]))


def class_name(label: str) -> str:
    """A label that is JSON, as a person reads it."""
    value = json.loads(label)
    return value if isinstance(value, str) else label


def _texts(example: Example) -> tuple[str, str | None]:
    target = example.target
    match target:
        case Tags():
            return " ".join(target.tokens), None
        case Span():
            return target.question, target.context
        case Labels():
            return example.text or "", target.text_pair
    raise UserError(f"{example.where} has no target that this task learns")


def _target(example: Example, kind: type[Any]) -> Any:
    if not isinstance(example.target, kind):
        raise UserError(f"{example.where} has no {kind.__name__.lower()}, which the task learns")
    return example.target


def _tokens(encoding: Any) -> Tokens:
    """Those that the tokenizer puts after a text stand behind all of it."""
    starts, ends = np.array(encoding.offsets, np.int64).reshape(-1, 2).T
    of_text = np.flatnonzero(np.array(encoding.special_tokens_mask) == 0)
    after = of_text.max(initial=-1) + 1
    ends[after:] = starts[after:] = ends.max(initial=0) + 1
    return Tokens("", np.array(encoding.ids, np.int32), ends, starts)


def _document(
    example: Example, encoding: Any, labels: Sequence[tuple[int, float, float]]
) -> Document:
    found = np.array(labels, LABEL)
    weights = np.zeros(len(encoding.ids), np.float32)
    weights[found["position"]] = 1
    return Document(np.array(encoding.ids, np.int32), weights, example.where, found)
