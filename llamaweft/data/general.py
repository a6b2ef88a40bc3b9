"""General prompts that ship with the package: what a model could do before it was tuned.

general_prompts.jsonl holds them, written for this project: {"area", "prompt", "answer"} a line.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from llamaweft.data.chat import Document, Encoder, Tokenizer
from llamaweft.data.example import Example
from llamaweft.errors import UserError

AREAS = ("facts", "reasoning", "code", "languages", "safety")


@dataclass(frozen=True)
class GeneralPrompt:
    """where: its area and its number there."""

    area: str
    prompt: str
    answer: str
    where: str


@dataclass(frozen=True, eq=False)
class General:
    """Prompts with what a model reads of them. documents: prompt and answer, of which the answer's
    tokens are the labels. prompt_ids: up to where the answer begins."""

    prompts: list[GeneralPrompt]
    documents: list[Document]
    prompt_ids: list[list[int]]

    @property
    def labels(self) -> int:
        return sum(document.trained_tokens for document in self.documents)

    def batches(self, tokens: int) -> Iterator[list[Document]]:
        """The documents in their order, so many tokens at once."""
        batch: list[Document] = []
        held = 0
        for document in self.documents:
            if batch and held + len(document.ids) > tokens:
                yield batch
                batch, held = [], 0
            batch.append(document)
            held += len(document.ids)
        yield batch


@cache
def shipped() -> dict[str, list[GeneralPrompt]]:
    """All prompts of each area."""
    found: dict[str, list[GeneralPrompt]] = {area: [] for area in AREAS}
    text = Path(__file__).with_name("general_prompts.jsonl").read_text(encoding="utf-8")
    for line in text.splitlines():
        row: dict[str, Any] = json.loads(line)
        of_area = found[row["area"]]
        of_area.append(GeneralPrompt(**row, where=f"{row['area']} {len(of_area) + 1}"))
    return found


def general_prompts(count: int) -> list[GeneralPrompt]:
    """`count` of them, evenly over the areas and spread over each one's list, area by area."""
    chosen: list[GeneralPrompt] = []
    for index, area in enumerate(AREAS):
        share = count // len(AREAS) + (index < count % len(AREAS))
        of_area = shipped()[area]
        if share > len(of_area):
            raise ValueError(f"{area} has {len(of_area)} prompts, not {share}")
        chosen += [of_area[len(of_area) * i // share] for i in range(share)]
    return chosen


def read_general(
    prompts: Sequence[GeneralPrompt], tokenizer: Tokenizer, new: Container[int] = ()
) -> General:
    """What a model reads of them: chats, or plain text where the tokenizer has no chat template.

    new: tokens that the model did not have before; none of them is a label. Raises UserError where
    the chat template leaves no label at all.
    """
    read = _as_chats if tokenizer.chat_template else _as_texts
    documents, prompt_ids = read(prompts, Encoder(tokenizer))
    documents = [_without(document, new) for document in documents]
    kept = [i for i, document in enumerate(documents) if document.trained_tokens]
    if not kept:
        raise UserError(
            "forgetting: the chat template leaves no token of the general prompts' answers to "
            "measure on; remove forgetting, or give another data.chat_template"
        )
    return General(*([column[i] for i in kept] for column in (prompts, documents, prompt_ids)))  # type: ignore[arg-type]


def _as_chats(
    prompts: Sequence[GeneralPrompt], encoder: Encoder
) -> tuple[list[Document], list[list[int]]]:
    asked = [Example(p.where, ({"role": "user", "content": p.prompt},)) for p in prompts]
    answers = [{"role": "assistant", "content": p.answer} for p in prompts]
    chats = [
        Example(e.where, (*e.messages, answer)) for e, answer in zip(asked, answers, strict=True)
    ]
    return encoder(chats), [encoder.prompt_ids(example) for example in asked]


def _as_texts(
    prompts: Sequence[GeneralPrompt], encoder: Encoder
) -> tuple[list[Document], list[list[int]]]:
    """The answer begins on a line of its own."""
    whole = encoder([Example(p.where, text=f"{p.prompt}\n{p.answer}") for p in prompts])
    asked = encoder([Example(p.where, text=f"{p.prompt}\n") for p in prompts])
    documents, prompt_ids = [], []
    for document, prompt in zip(whole, asked, strict=True):
        length = _alike(document.ids, prompt.ids)  # the prompt's own end token is not alike
        weights = np.where(np.arange(len(document.ids)) < length, 0, document.weights)
        documents.append(Document(document.ids, weights, document.where))
        prompt_ids.append(document.ids[:length].tolist())
    return documents, prompt_ids


def _alike(ids: np.ndarray, others: np.ndarray) -> int:
    """Tokens that both begin with."""
    most = min(len(ids), len(others))
    differ = np.flatnonzero(ids[:most] != others[:most])
    return int(differ[0]) if len(differ) else most


def _without(document: Document, new: Container[int]) -> Document:
    """The document with no label among these tokens."""
    is_new = np.array([int(token) in new for token in document.ids])
    return Document(document.ids, np.where(is_new, 0, document.weights), document.where)
