"""From examples to documents: token ids, and how much each token counts as a target.

The chat template is the tokenizer's own, rendered by transformers. Which tokens are an
assistant's is read from the template itself: what a turn adds to the text before it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jinja2.exceptions import TemplateError

from llamaweft.data.formats import Example, Message
from llamaweft.errors import UserError

Tokenizer = Any
"""A transformers fast tokenizer."""


@dataclass(frozen=True, eq=False)
class Document:
    """ids (int32) and weights (float32: 0 = context, 1 = trained), both of the same length."""

    ids: np.ndarray
    weights: np.ndarray
    where: str
    key: str

    @property
    def trained_tokens(self) -> int:
        return int(np.count_nonzero(self.weights[1:]))


def encode(tokenizer: Tokenizer, example: Example, train_on: str = "assistant") -> Document:
    """Tokenise an example. `train_on`: assistant (every answer), last (the last answer) or all.

    An answer is trained together with its end-of-turn token, not with white space after it.
    Raises UserError when the template cannot render the row.
    """
    if example.text is not None:
        return _encode_text(tokenizer, example)
    text = render(tokenizer, example.messages, example.where)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = np.asarray(encoding["input_ids"], dtype=np.int32)
    if train_on == "all":
        return Document(ids, np.ones(len(ids), np.float32), example.where, example.key)
    offsets = np.asarray(encoding["offset_mapping"], dtype=np.int64)
    starts, ends = offsets[:, 0], offsets[:, 1]
    special = special_ids(tokenizer)
    weights = np.zeros(len(ids), np.float32)
    answers = [i for i, message in enumerate(example.messages) if message["role"] == "assistant"]
    for index in answers[-1:] if train_on == "last" else answers:
        start, end = _answer_span(tokenizer, example, text, index)
        # A token that begins in the header is part of the prompt when the model answers.
        first = int(np.searchsorted(starts, start, side="left"))
        last = int(np.searchsorted(ends, end, side="right"))
        closing = [token for token in range(first, last) if int(ids[token]) in special]
        if closing and not text[ends[closing[-1]] : end].strip():
            last = closing[-1] + 1
        weights[first:last] = 1
    return Document(ids, weights, example.where, example.key)


def _encode_text(tokenizer: Tokenizer, example: Example) -> Document:
    ids = tokenizer(example.text)["input_ids"]
    if ids and tokenizer.eos_token_id is not None and ids[-1] != tokenizer.eos_token_id:
        ids = [*ids, tokenizer.eos_token_id]
    weights = np.ones(len(ids), np.float32)
    return Document(np.asarray(ids, dtype=np.int32), weights, example.where, example.key)


def _answer_span(tokenizer: Tokenizer, example: Example, text: str, index: int) -> tuple[int, int]:
    """Where the answer `index` stands in the rendered text: from the end of its header, which
    the template writes as generation prompt, to the end of what the turn adds."""
    before = ""  # a chat that opens with an answer, which the audit blocks
    if index:
        before = render(tokenizer, example.messages[:index], example.where, generation_prompt=True)
    after = render(tokenizer, example.messages[: index + 1], example.where)
    if not (text.startswith(after) and after.startswith(before)):
        raise UserError(
            f"{example.where}: the chat template writes an earlier turn differently once a later "
            "one follows, so the tokens of an answer cannot be told; use train_on: last or all"
        )
    return len(before), len(after)


def render(
    tokenizer: Tokenizer,
    messages: tuple[Message, ...] | list[Message],
    where: str,
    generation_prompt: bool = False,
) -> str:
    """The chat as text, by the tokenizer's own template.

    Raises UserError when there is no template, or when it refuses these messages.
    """
    if not tokenizer.chat_template:
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path} has no chat template; use an instruct model"
        )
    try:
        return tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=generation_prompt
        )
    except (TemplateError, TypeError, KeyError) as error:
        raise UserError(f"{where}: the chat template refuses these messages: {error}") from None


def prompt_ids(tokenizer: Tokenizer, messages: list[Message], where: str = "the chat") -> list[int]:
    """Token ids of a chat up to where the assistant's answer begins."""
    text = render(tokenizer, messages, where, generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


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
        document = encode(tokenizer, Example("the stop token", tuple(chat)))
        trained = document.ids[np.flatnonzero(document.weights)]
        if len(trained) and int(trained[-1]) in special_ids(tokenizer):
            stops.add(int(trained[-1]))
    return stops


def fit_length(
    documents: list[Document], max_length_tokens: int, policy: str | None
) -> list[Document]:
    """Apply `data.on_too_long` to documents of more than `max_length_tokens`.

    split: consecutive documents. drop: left out. truncate: the end is cut. None: kept as they
    are, for the audit to block.
    """
    kept: list[Document] = []
    for document in documents:
        if policy is None or len(document.ids) <= max_length_tokens:
            kept.append(document)
        elif policy != "drop":
            end = max_length_tokens if policy == "truncate" else len(document.ids)
            for start in range(0, end, max_length_tokens):
                part = slice(start, start + max_length_tokens)
                kept.append(
                    replace(document, ids=document.ids[part], weights=document.weights[part])
                )
    return kept
