"""From sources to documents: read, held out, encoded, audited, fitted to length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from llamaweft.data.audit import Audit, audit
from llamaweft.data.chat import Document, Tokenizer, encode, fit_length
from llamaweft.data.formats import Example, to_examples
from llamaweft.data.holdout import hold_out
from llamaweft.data.sources import read_hub, read_path


class Source(Protocol):
    """Where rows come from; the recipe's `data.train` rows are such."""

    @property
    def path(self) -> str | None: ...
    @property
    def hub(self) -> str | None: ...
    @property
    def config(self) -> str | None: ...
    @property
    def split(self) -> str: ...
    @property
    def revision(self) -> str | None: ...
    @property
    def format(self) -> str: ...
    @property
    def columns(self) -> dict[str, str] | None: ...


@dataclass(frozen=True)
class Prepared:
    """What is learnt, how often in an epoch (`weights`), and what is only measured on."""

    examples: list[Example]
    documents: list[Document]
    weights: np.ndarray
    validation: list[Example]
    validation_documents: list[Document]
    audit: Audit


@dataclass(frozen=True)
class Preparation:
    """How rows become documents: the recipe's `task` and `data` keys, and the seed."""

    tokenizer: Tokenizer
    task: str
    train_on: str
    max_length_tokens: int
    on_too_long: str | None
    seed: int

    def read(self, source: Source) -> list[Example]:
        """The examples of a source. Raises UserError, naming the row, for what cannot be read."""
        rows = (
            read_path(source.path)
            if source.path is not None
            else read_hub(str(source.hub), source.config, source.split, source.revision)
        )
        return to_examples(rows, self.task, source.format, source.columns)

    def encode(self, examples: Sequence[Example]) -> list[Document]:
        return [encode(self.tokenizer, example, self.train_on) for example in examples]

    def held_out(self, examples: list[Example]) -> list[Document]:
        """Documents to measure on: those with a trained token, and never an error for length."""
        documents = [d for d in self.encode(examples) if d.trained_tokens]
        return fit_length(documents, self.max_length_tokens, self.on_too_long or "truncate")

    def prepare(
        self,
        train: Sequence[tuple[Source, float]],
        validation: Source | None,
        fraction: float | None,
    ) -> Prepared:
        """Read `train` (each source with how often its rows are seen in an epoch), hold out
        `validation` or a `fraction` of the training rows, and audit what remains."""
        pairs = [(e, weight) for source, weight in train for e in self.read(source)]
        held: list[Example] = []
        if fraction is not None:
            out = hold_out([example for example, _ in pairs], fraction, self.seed)
            held = [example for (example, _), taken in zip(pairs, out, strict=True) if taken]
            pairs = [pair for pair, taken in zip(pairs, out, strict=True) if not taken]
        elif validation is not None:
            held = self.read(validation)
        examples = [example for example, _ in pairs]
        documents = self.encode(examples)
        found = audit(
            self.tokenizer,
            examples,
            documents,
            held,
            max_length_tokens=self.max_length_tokens,
            on_too_long=self.on_too_long,
        )
        fitted = [
            (piece, weight)
            for document, (_, weight) in zip(documents, pairs, strict=True)
            for piece in fit_length([document], self.max_length_tokens, self.on_too_long)
            if piece.trained_tokens
        ]
        return Prepared(
            examples=examples,
            documents=[piece for piece, _ in fitted],
            weights=np.array([weight for _, weight in fitted]),
            validation=held,
            validation_documents=self.held_out(held),
            audit=found,
        )
