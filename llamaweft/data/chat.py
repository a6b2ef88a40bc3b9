"""From examples to documents: token ids, and how much each token counts as a target.

Text is tokenised whole, in batches, by the tokenizer's Rust core, which uses every core and lets
Python work meanwhile: so rendering, tokenising and what follows are three calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from llamaweft.data.example import Example
from llamaweft.data.template import ChatTemplate, Rendered, Span, control_pattern, special_texts
from llamaweft.data.tokens import TextTokenizer, Tokens
from llamaweft.prefixes import texts_within

Tokenizer = Any
"""A transformers fast tokenizer."""


@dataclass(frozen=True, eq=False)
class Document:
    """ids (int32) and weights (float32: 0 = context, above = trained), both of the same length.
    where: the row it comes from. labels: what a head reads (targets.LABEL); None: the tokens before
    a trained one predict it. second: of a pair of texts, where the second begins: neither sees the
    other, and the pair is never cut; 0: there is one text."""

    ids: np.ndarray
    weights: np.ndarray
    where: str
    labels: np.ndarray | None = None
    second: int = 0

    @property
    def texts(self) -> list[np.ndarray]:
        """Token ids of the text, or of both."""
        return texts_within(self.ids, self.second)

    @property
    def trained_tokens(self) -> int:
        if self.labels is not None:
            return len(self.labels)
        return int(np.count_nonzero(self.weights[1:]))

    def part(self, start: int, stop: int) -> Document:
        """Tokens [start, stop)."""
        labels = self.labels
        if labels is not None:
            labels = labels_within(labels, start, stop)
        ids, weights = self.ids[start:stop], self.weights[start:stop]
        return Document(ids, weights, self.where, labels, self.second)


def labels_within(labels: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Those of tokens [start, stop), counted from there; those of the last token stay so."""
    of_last = labels["position"] < 0
    inside = (labels["position"] >= start) & (labels["position"] < stop)
    found = labels[of_last | inside].copy()
    found["position"] -= np.where(found["position"] < 0, 0, start)
    return found


class Encoder:
    """Tokenises examples. train_on: assistant (every answer), last (the last answer) or all.

    An answer is trained together with its end-of-turn token, not with white space after it; as
    much as its message's `weight` says. What a person wrote is never read as a control token.
    """

    def __init__(self, tokenizer: Tokenizer, train_on: str = "assistant") -> None:
        self.tokenizer, self.train_on = tokenizer, train_on
        self.core = tokenizer.backend_tokenizer
        self.special = special_ids(tokenizer)
        self._control = control_pattern(tokenizer)
        self._texts = TextTokenizer(self.core, self._control)
        self._firsts = {name[0] for name in special_texts(tokenizer)}

    @cached_property
    def template(self) -> ChatTemplate:
        return ChatTemplate(self.tokenizer)

    def __call__(self, examples: Sequence[Example]) -> list[Document]:
        """Raises UserError when the template refuses a row."""
        texts = self.render(examples)
        return self.documents(examples, texts, self.tokenise(texts))

    def render(self, examples: Sequence[Example]) -> list[Rendered]:
        """The text of each: all chats, or all of them text."""
        if examples and examples[0].text is not None:
            return [Rendered(e.text or "", (Span(0, len(e.text or "")),)) for e in examples]
        return self.template.rendered(examples) if examples else []

    def tokenise(self, texts: Sequence[Rendered]) -> list[Any]:
        """An encoding each; Python goes on in other threads meanwhile."""
        places = any(one.answers for one in texts)
        return self._texts.encode([one.text for one in texts], places)

    def documents(
        self, examples: Sequence[Example], texts: Sequence[Rendered], encodings: Sequence[Any]
    ) -> list[Document]:
        """From what `render` and `tokenise` gave."""
        return [
            self._text(example, text, encoding)
            if example.text is not None
            else self._chat(example, text, encoding)
            for example, text, encoding in zip(examples, texts, encodings, strict=True)
        ]

    def prompt_ids(self, example: Example) -> list[int]:
        """Token ids of a chat up to where the assistant's answer begins."""
        text = self.template.prompt(example)
        return self._ids(text, self.core.encode(text.text, add_special_tokens=False))

    def writes_control_tokens(self, text: Rendered) -> bool:
        """Whether a person wrote what reads like a control token."""
        for span in text.contents:
            if span is None:
                continue
            for first in self._firsts:
                if text.text.find(first, span.start, span.end) >= 0:
                    if self._control.search(text.text, span.start, span.end):
                        return True
                    break
        return False

    def _ids(self, text: Rendered, encoding: Any) -> list[int]:
        if not self.writes_control_tokens(text):
            ids: list[int] = encoding.ids
            return ids
        return self._texts.without_control(text.text, text.contents).ids.tolist()

    def _chat(self, example: Example, text: Rendered, encoding: Any) -> Document:
        if self.writes_control_tokens(text):
            tokens = self._texts.without_control(text.text, text.contents)
        else:
            tokens = self._texts.tokens(text.text, encoding)
        weights = np.full(len(tokens.ids), float(self.train_on == "all"), np.float32)
        last = text.answers[-1][0] if text.answers else None
        for index, span in text.answers:
            if self.train_on == "last" and index != last:
                continue
            weight = example.messages[index].get("weight")
            if self.train_on != "all" or weight is not None:
                first, last = self._trained(text, tokens, span)
                weights[first:last] = 1.0 if weight is None else weight
        return Document(tokens.ids, weights, example.where)

    def _trained(self, text: Rendered, tokens: Tokens, span: Span) -> tuple[int, int]:
        """Tokens [first, last) of an answer. One that begins in the header is part of the prompt
        when the model answers."""
        if text.marked:
            return tokens.touching(span)
        first, last = tokens.first_from(span.start), tokens.count_until(span.end)
        for token in reversed(range(first, last)):
            if int(tokens.ids[token]) in self.special:
                return first, token + 1
            if tokens.said(token, span.end).strip():
                break
        return first, last

    def _text(self, example: Example, text: Rendered, encoding: Any) -> Document:
        begin, end = self._around
        ids = np.array([*begin, *self._ids(text, encoding), *end], dtype=np.int32)
        return Document(ids, np.ones(len(ids), np.float32), example.where)

    def begins_with(self, token: int) -> bool:
        """Whether plain text gets this token put before it."""
        return self._around[0][:1] == [token]

    @cached_property
    def _around(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts before and after a text, and the end token where it puts none."""
        bare = self.core.encode("a", add_special_tokens=False).ids
        ids = self.core.encode("a").ids
        places = range(len(ids) - len(bare) + 1)
        at = next((i for i in places if ids[i : i + len(bare)] == bare), 0)
        begin, end = ids[:at], ids[at + len(bare) :]
        if not end and self.tokenizer.eos_token_id is not None:
            end = [int(self.tokenizer.eos_token_id)]
        return begin, end


def special_ids(tokenizer: Tokenizer) -> set[int]:
    """Control tokens: what text cannot write."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def stop_ids(tokenizer: Tokenizer) -> set[int]:
    """Tokens that end an answer: the end of the sequence, and what the template closes an
    assistant's turn with."""
    stops = set() if tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id)}
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        (document,) = Encoder(tokenizer)([Example("the stop token", tuple(chat))])
        trained = document.ids[np.flatnonzero(document.weights)]
        if len(trained) and int(trained[-1]) in special_ids(tokenizer):
            stops.add(int(trained[-1]))
    return stops
