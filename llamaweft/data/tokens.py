"""Where characters of a text are in its tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from llamaweft.data.template import Span


class Tokens:
    """The tokens of a text. Of an encoding of the tokenizers library only single places are asked
    for, since all offsets as Python numbers take longer than the tokenising."""

    def __init__(self, ids: list[int], encoding: Any = None, offsets: Any = None) -> None:
        self.ids = ids
        self._encoding = encoding
        self._given = offsets

    def first_from(self, char: int) -> int:
        """The first token that begins at a character or later."""
        token = self._holding(char)
        if token is None:
            return int(np.searchsorted(self._offsets[:, 0], char, side="left"))
        while token < len(self.ids) and self.start(token) < char:
            token += 1
        return token

    def count_until(self, char: int) -> int:
        """How many tokens end at a character or before."""
        token = self._holding(char)
        if token is not None:
            return token
        last = None if self._encoding is None else self._encoding.token_to_chars(len(self.ids) - 1)
        if last is not None and last[1] <= char:
            return len(self.ids)
        return int(np.searchsorted(self._offsets[:, 1], char, side="right"))

    def touching(self, span: Span) -> tuple[int, int]:
        """Tokens [first, last) that hold any of the characters, by the rule of transformers'
        `assistant_masks`: up to the first token that holds the last character."""
        first, last = self._holding(span.start), self._holding(span.end - 1)
        if first is None:
            return 0, 0
        return first, len(self.ids) if not last else last + 1

    def start(self, token: int) -> int:
        """The first character of a token."""
        if self._encoding is not None:
            found = self._encoding.token_to_chars(token)
            if found is not None:
                return int(found[0])
        return int(self._offsets[token, 0])

    def _holding(self, char: int) -> int | None:
        """The first token that holds a character; None where none does."""
        if self._encoding is not None:
            found: int | None = self._encoding.char_to_token(char)
            return found
        token = int(np.searchsorted(self._offsets[:, 1], char, side="right"))
        inside = token < len(self.ids) and self._offsets[token, 0] <= char
        return token if inside else None

    @cached_property
    def _offsets(self) -> np.ndarray:
        given = self._given if self._encoding is None else self._encoding.offsets
        return np.asarray(given, dtype=np.int64).reshape(-1, 2)


def without_control(
    core: Any, plain_core: Any, control: re.Pattern[str], text: str, written: Sequence[Span | None]
) -> Tokens:
    """Tokens of a text in which control tokens that stand in the spans `written` by a person are
    plain text. core reads control tokens, plain_core reads them as text.

    The tokenizers library cuts a text at control tokens before it does anything else; so the
    pieces between them, tokenised one by one, give what the whole text gives.
    """
    spans = sorted(span for span in written if span is not None)
    cuts = [
        match.span()
        for match in control.finditer(text)
        if not any(span.start < match.end() and match.start() < span.end for span in spans)
    ]
    ids: list[int] = []
    offsets: list[tuple[int, int]] = []
    at = 0
    for start, end in [*cuts, (len(text), len(text))]:
        pieces = [(plain_core, text[at:start], at), (core, text[start:end], start)]
        for tokenizer, piece, shift in pieces:
            encoding = tokenizer.encode(piece, add_special_tokens=False)
            ids += encoding.ids
            offsets += [(a + shift, b + shift) for a, b in encoding.offsets]
        at = end
    return Tokens(ids, offsets=offsets)
