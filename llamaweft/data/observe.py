"""What can be seen of one row alone: mistakes that look like healthy runs, as flags."""

from __future__ import annotations

import re
from collections.abc import Collection
from enum import IntFlag
from typing import Any

import numpy as np

from llamaweft.data.chat import Document, Encoder, stop_ids
from llamaweft.data.example import Example, Preference
from llamaweft.data.pairs import sides_of
from llamaweft.data.targets import TargetEncoder
from llamaweft.data.template import Rendered, RenderedPair


class Flag(IntFlag):
    """Named as the checks of the audit."""

    ROLE_ORDER = 1
    EMPTY_ANSWER = 2
    UNTRAINED_END_OF_TURN = 4
    BEGIN_OF_TEXT = 8
    OUT_OF_VOCABULARY = 16
    UNTRAINED_TOKEN = 32
    CONTROL_TOKEN_TEXT = 64
    CONTENT_CHANGED = 128
    PERSONAL_DATA = 256
    NEAR_DUPLICATE = 512
    SAME_ANSWERS = 1024


_MAIL = re.compile(r"[\w.+-]+@[\w-]+\.[a-z]{2,}", re.IGNORECASE)
_TELEPHONE = re.compile(
    r"(?<![\w.])\+?[0-9]{1,3}[ -]?\(?[0-9]{2,4}\)?(?:[ -][0-9]{2,4}){2,3}(?!\w)"
)
_GROUPS_AS_ZEROS = bytes.maketrans(b"123456789-", b"000000000 ")
_GROUPS, FAR = b"00 00", 16
"""What every telephone number holds, so many characters from its beginning at most."""
_KEY_BEGINS = ("sk-", "sk_", "ghp_", "hf_", "xoxb-", "xoxp-", "AKIA")
_KEY = re.compile(rf"\b(?:{'|'.join(_KEY_BEGINS)})[\w-]{{16,}}")


class Observer:
    """Looks at rows as they are prepared. vocab_size: of the model, which may be smaller than the
    tokenizer's. untrained: tokens whose embedding the model never learnt."""

    def __init__(
        self,
        encoder: Encoder | TargetEncoder,
        vocab_size: int | None = None,
        untrained: Collection[int] = (),
    ) -> None:
        tokenizer = encoder.tokenizer
        self.encoder = encoder
        self.vocab_size = vocab_size
        self.untrained = np.array(sorted(untrained), np.int32)
        self.stops = stop_ids(tokenizer) if isinstance(encoder, Encoder) else set()
        self.bos: int | None = tokenizer.bos_token_id
        self.begins = self.bos is not None and encoder.begins_with(self.bos)

    def flags(self, example: Example, text: Rendered, document: Document) -> int:
        found = Flag(0)
        if isinstance(text, RenderedPair):
            found |= _of_pair(example, text, document)
        elif example.text is None and document.labels is None:
            found |= _of_chat(example, text)
        ids = document.ids
        ends = document.labels is not None or self._ends(document)
        if document.trained_tokens and not ends:
            found |= Flag.UNTRAINED_END_OF_TURN
        if not all(map(self._begins_once, document.texts)):
            found |= Flag.BEGIN_OF_TEXT
        if self.vocab_size is not None and len(ids) and int(ids.max()) >= self.vocab_size:
            found |= Flag.OUT_OF_VOCABULARY
        if len(self.untrained) and np.isin(ids, self.untrained).any():
            found |= Flag.UNTRAINED_TOKEN
        if self.encoder.writes_control_tokens(text):
            found |= Flag.CONTROL_TOKEN_TEXT
        if _personal(text.text):
            found |= Flag.PERSONAL_DATA
        return int(found)

    def _ends(self, document: Document) -> bool:
        """Whether the last trained token ends a turn; white space may follow it."""
        places = np.flatnonzero(document.weights)[-3:]
        tail = [token for token in document.ids[places].tolist() if token in self.encoder.special]
        return bool(tail) and tail[-1] in self.stops

    def _begins_once(self, ids: np.ndarray) -> bool:
        if self.bos is None:
            return True
        first = ids[:2].tolist()
        return first != [self.bos, self.bos] and (not self.begins or first[:1] == [self.bos])


def _of_chat(example: Example, text: Rendered) -> Flag:
    found = Flag(0)
    if not roles_in_order(example):
        found |= Flag.ROLE_ORDER
    if any(_is_empty_answer(message) for message in example.messages):
        found |= Flag.EMPTY_ANSWER
    if _content_changed(example, text):
        found |= Flag.CONTENT_CHANGED
    return found


def _of_pair(example: Example, text: RenderedPair, document: Document) -> Flag:
    target = example.target
    assert isinstance(target, Preference)
    found = Flag(0)
    chosen, rejected = document.texts
    if np.array_equal(chosen, rejected):
        found |= Flag.SAME_ANSWERS
    if target.plain:
        empty = any(_is_empty_answer(message) for message in (*target.chosen, *target.rejected))
        return found | (Flag.EMPTY_ANSWER if empty else Flag(0))
    for side, written in zip(sides_of(example), text.sides, strict=True):
        found |= _of_chat(side, written)
    return found


def roles_in_order(example: Example) -> bool:
    """An optional system message, then user and assistant in turn; results of functions follow the
    answer that called them, and the answer to the user follows them."""
    messages = example.messages
    if messages and messages[0]["role"] == "system":
        messages = messages[1:]
    expected = {"user"}
    for message in messages:
        role = message["role"]
        if role not in expected:
            return False
        if role == "assistant":
            expected = {"tool"} if message.get("tool_calls") else {"user"}
        else:
            expected = {"assistant", "tool"} if role == "tool" else {"assistant"}
    return bool(messages)


def _is_empty_answer(message: dict[str, Any]) -> bool:
    called = message.get("tool_calls")
    return message["role"] == "assistant" and not called and not message["content"].strip()


def _content_changed(example: Example, text: Rendered) -> bool:
    """Whether the template leaves out or alters a message, white space included."""
    return any(
        span is None or text.text[span.start : span.end] != message["content"]
        for message, span in zip(example.messages, text.contents, strict=True)
        if message["content"]
    )


def _personal(text: str) -> bool:
    """A cheap look first: most texts hold nothing like it."""
    if "@" in text and _MAIL.search(text):
        return True
    written = text.encode()
    groups = written.translate(_GROUPS_AS_ZEROS).find(_GROUPS)
    if groups >= 0:
        begin = max(0, len(written[:groups].decode()) - FAR)
        if _TELEPHONE.search(text, begin):
            return True
    return any(begin in text for begin in _KEY_BEGINS) and bool(_KEY.search(text))
