"""Where characters of a text are in its tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from copy import deepcopy
from functools import cached_property
from typing import Any

import numpy as np

from llamaweft.data.template import Span


class Tokens:
    """The tokens of a text. ids, ends, starts: of each token, int32; where it ends, and where it
    begins if that is not where the one before it ends. In characters, or in bytes."""

    def __init__(
        self,
        text: str,
        ids: np.ndarray,
        ends: np.ndarray,
        starts: np.ndarray | None = None,
        in_bytes: bool = False,
    ) -> None:
        self.text, self.ids, self._ends, self._given = text, ids, ends, starts
        self._in_bytes = in_bytes and not text.isascii()

    def first_from(self, char: int) -> int:
        """The first token that begins at a character or later."""
        return int(self._starts.searchsorted(self._place(char), side="left"))

    def count_until(self, char: int) -> int:
        """How many tokens end at a character or before."""
        return int(self._ends.searchsorted(self._place(char), side="right"))

    def touching(self, span: Span) -> tuple[int, int]:
        """Tokens [first, last) that hold any of the characters, by the rule of transformers'
        `assistant_masks`: up to the first token that holds the last character."""
        first, last = self._holding(span.start), self._holding(span.end - 1)
        if first is None:
            return 0, 0
        return first, len(self.ids) if not last else last + 1

    def said(self, token: int, end: int) -> str:
        """The text from where a token begins to a character."""
        start = int(self._starts[token])
        if not self._in_bytes:
            return self.text[start:end]
        return self.text.encode()[start : self._place(end)].decode(errors="replace")

    def _holding(self, char: int) -> int | None:
        """The first token that holds a character; None where none does."""
        place = self._place(char)
        token = int(self._ends.searchsorted(place, side="right"))
        inside = token < len(self.ids) and self._starts[token] <= place
        return token if inside else None

    def _place(self, char: int) -> int:
        """A character's place, counted as the tokens' are."""
        return int(self._bytes_before[char]) if self._in_bytes else char

    @cached_property
    def _bytes_before(self) -> np.ndarray:
        """For each character of the text, and for its end."""
        written = np.frombuffer(self.text.encode(), np.uint8)
        return np.append(np.flatnonzero(written & 0xC0 != 0x80), len(written))

    @cached_property
    def _starts(self) -> np.ndarray:
        if self._given is not None:
            return self._given
        return np.concatenate([[0], self._ends[:-1]])


class TextTokenizer:
    """The Rust core of a tokenizer. control: finds its control tokens in text.

    The library spends a quarter of its time on offsets. The tokens of byte-level BPE need none:
    each stands for as many bytes of the text as it has characters, so their lengths say where they
    are. Where the lengths do not add up, and for other tokenizers, the library is asked.
    """

    def __init__(self, core: Any, control: re.Pattern[str]) -> None:
        self.core, self._control = core, control

    def encode(self, texts: Sequence[str], places: bool) -> list[Any]:
        """An encoding each; Python goes on in other threads meanwhile. places: whether `tokens`
        will be asked for."""
        fast = self._lengths is not None or not places
        encode = self.core.encode_batch_fast if fast else self.core.encode_batch
        return list(encode(texts, add_special_tokens=False))

    def tokens(self, text: str, encoding: Any) -> Tokens:
        """Of a text whose encoding, with places, `encode` gave."""
        ids = np.array(encoding.ids, np.int32)
        if self._lengths is not None:
            ends = np.cumsum(self._lengths[ids])
            size = len(text) if text.isascii() else len(text.encode())
            if (ends[-1] if len(ends) else 0) == size:
                return Tokens(text, ids, ends, in_bytes=True)
            encoding = self.core.encode(text, add_special_tokens=False)
        places = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        return Tokens(text, ids, places[:, 1], places[:, 0])

    def without_control(self, text: str, written: Sequence[Span | None]) -> Tokens:
        """Tokens of a text in which control tokens that stand in the spans `written` by a person
        are plain text.

        The library cuts a text at control tokens before it does anything else; so the pieces
        between them, tokenised one by one, give what the whole text gives.
        """
        spans = sorted(span for span in written if span is not None)
        cuts = [
            match.span()
            for match in self._control.finditer(text)
            if not any(span.start < match.end() and match.start() < span.end for span in spans)
        ]
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        at = 0
        for start, end in [*cuts, (len(text), len(text))]:
            pieces = [(self._plain_core, text[at:start], at), (self.core, text[start:end], start)]
            for tokenizer, piece, shift in pieces:
                encoding = tokenizer.encode(piece, add_special_tokens=False)
                ids += encoding.ids
                offsets += [(a + shift, b + shift) for a, b in encoding.offsets]
            at = end
        places = np.array(offsets, np.int64).reshape(-1, 2)
        return Tokens(text, np.array(ids, np.int32), places[:, 1], places[:, 0])

    @cached_property
    def _plain_core(self) -> Any:
        """Reads control tokens as text."""
        core = deepcopy(self.core)
        core.encode_special_tokens = True
        return core

    @cached_property
    def _lengths(self) -> np.ndarray | None:
        """Bytes that each token stands for; None where the tokenizer is not byte-level BPE."""
        content = json.loads(self.core.to_str())
        cut = content["pre_tokenizer"] or {}
        cuts = cut["pretokenizers"] if cut.get("type") == "Sequence" else [cut]
        if content["model"].get("type") != "BPE" or all(c.get("type") != "ByteLevel" for c in cuts):
            return None
        vocabulary = self.core.get_vocab(with_added_tokens=True)
        lengths = np.zeros(max(vocabulary.values(), default=0) + 1, np.int64)
        lengths[list(vocabulary.values())] = [len(token) for token in vocabulary]
        for token in content["added_tokens"]:
            lengths[token["id"]] = len(token["content"].encode())
        return lengths
