"""Preferences: two texts that a reward is read off, of which one should have more than the other.

Each row is one document: the ids of the better text, then those of the other, and a label for each
at the token where its reward is read. Ids and tokens are those of trl's RewardTrainer:
https://github.com/huggingface/trl/blob/v1.16.0/trl/trainer/reward_trainer.py
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from llamaweft.data.chat import Document, Encoder, Tokenizer
from llamaweft.data.example import Example, Preference
from llamaweft.data.targets import LABEL
from llamaweft.data.template import Rendered, RenderedPair
from llamaweft.errors import UserError

CHOSEN, REJECTED = 1.0, -1.0
"""Targets of a pair's labels: the sign that each reward has in their difference."""


class PairEncoder(Encoder):
    """Tokenises preferences, as `Encoder` does chats.

    Messages are written by the chat template, up to the end of the last turn. Plain text is read as
    the tokenizer reads it, with the end token after it where it is not there yet.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer, train_on="")
        self._end = tokenizer.eos_token or ""
        self._padding = padding_id(tokenizer)

    def render(self, examples: Sequence[Example]) -> list[Rendered]:
        """Both texts of each."""
        chats = [side for e in examples if not _preference(e).plain for side in sides_of(e)]
        rendered = iter(self.template.rendered(chats) if chats else [])
        found: list[Rendered] = []
        for example in examples:
            if _preference(example).plain:
                sides = tuple(self._plain(side) for side in sides_of(example))
            else:
                sides = next(rendered), next(rendered)
            found.append(RenderedPair("\n".join(side.text for side in sides), sides=sides))
        return found

    def _plain(self, side: Example) -> Rendered:
        text = "".join(message["content"] for message in side.messages)
        return Rendered(text if text.endswith(self._end) else text + self._end)

    def tokenise(self, texts: Sequence[Rendered]) -> list[Any]:
        """Two encodings each."""
        sides = [side for text in texts for side in _sides(text)]
        chats = iter(self._texts.encode([s.text for s in sides if s.contents], places=False))
        plain = [side.text for side in sides if not side.contents]
        others = iter(self.core.encode_batch_fast(plain, add_special_tokens=True))
        found = [next(chats if side.contents else others) for side in sides]
        return list(zip(found[::2], found[1::2], strict=True))

    def documents(
        self, examples: Sequence[Example], texts: Sequence[Rendered], encodings: Sequence[Any]
    ) -> list[Document]:
        """Raises UserError, naming the row, for a text without a token."""
        return [self._pair(*each) for each in zip(examples, texts, encodings, strict=True)]

    def _pair(self, example: Example, text: Rendered, encodings: Sequence[Any]) -> Document:
        sides = zip(_sides(text), encodings, strict=True)
        chosen, rejected = (np.array(self._ids(*side), np.int32) for side in sides)
        if not len(chosen) or not len(rejected):
            raise UserError(f"{example.where}: chosen or rejected has no token; fill or remove it")
        second = len(chosen)
        places = self._read_at(chosen), second + self._read_at(rejected)
        labels = np.array(
            [(place, sign, 0.5) for place, sign in zip(places, (CHOSEN, REJECTED), strict=True)],
            LABEL,
        )
        ids = np.concatenate([chosen, rejected])
        weights = np.zeros(len(ids), np.float32)
        weights[labels["position"]] = 1
        return Document(ids, weights, example.where, labels, second)

    def _read_at(self, ids: np.ndarray) -> int:
        """The last token that is no padding: there transformers reads a text. Where the end token
        pads, that is the one before it."""
        said = np.flatnonzero(ids != self._padding)
        return int(said[-1]) if len(said) else 0

    def writes_control_tokens(self, text: Rendered) -> bool:
        sides = text.sides if isinstance(text, RenderedPair) else (text,)
        return any(super(PairEncoder, self).writes_control_tokens(side) for side in sides)


def sides_of(example: Example) -> tuple[Example, Example]:
    """The prompt with the better answer, and with the other."""
    target = _preference(example)
    chosen, rejected = (
        replace(example, messages=(*example.messages, *answer), target=None)
        for answer in (target.chosen, target.rejected)
    )
    return chosen, rejected


def has_chats(examples: Iterable[Example]) -> bool:
    """Whether a preference among them is one of messages."""
    return any(not _preference(example).plain for example in examples)


def padding_id(tokenizer: Tokenizer) -> int | None:
    """The token that fills up a batch: the end token where the tokenizer has none of its own."""
    found: int | None = tokenizer.pad_token_id
    return tokenizer.eos_token_id if found is None else found


def _preference(example: Example) -> Preference:
    if not isinstance(example.target, Preference):
        raise UserError(f"{example.where} has no chosen and rejected, which task: reward learns")
    return example.target


def _sides(text: Rendered) -> tuple[Rendered, ...]:
    assert isinstance(text, RenderedPair)
    return text.sides
