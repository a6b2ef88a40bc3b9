"""From sources to documents: read, cleaned, encoded (build.py), held out, audited, fitted to
length."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from llamaweft.data.audit import EXAMPLES_SHOWN, Audit, Material, audit, rows_by_check
from llamaweft.data.build import Build
from llamaweft.data.chat import Document, Encoder, Tokenizer
from llamaweft.data.classes import Classes, find_classes, rare_rows
from llamaweft.data.contamination import MOST_REFERENCES, Contamination, contamination
from llamaweft.data.duplicates import repeated
from llamaweft.data.example import Example
from llamaweft.data.formats import to_examples
from llamaweft.data.holdout import hold_out
from llamaweft.data.observe import Flag, Observer
from llamaweft.data.pairs import PairEncoder
from llamaweft.data.selection import Documents, Examples, fitted, pieces
from llamaweft.data.sources import PlainSource, Source, read_rows
from llamaweft.data.store import StoredRows
from llamaweft.data.targets import HEAD_TASKS, REWARD, TargetEncoder


@dataclass(frozen=True)
class Prepared:
    """What is learnt, how often in an epoch (`weights`), and what is only measured on.

    examples: the rows that the documents are made of. found: held-out text in training rows.
    by_check: the rows that each check of the audit found. classes: of tasks that have some.
    """

    documents: Documents
    weights: np.ndarray
    examples: Examples
    validation: Examples
    validation_documents: Documents
    audit: Audit
    found: Contamination
    by_check: dict[str, np.ndarray]
    classes: Classes | None = None


@dataclass(frozen=True)
class Preparation:
    """How rows become documents: the recipe's `task`, `data` and `audit` keys, and the seed.

    clean: steps of `data.clean`. vocab_size: of the model. untrained: tokens that it never learnt.
    report: told how many rows have been prepared. say: told what takes long or much.
    """

    tokenizer: Tokenizer
    task: str
    train_on: str
    max_length_tokens: int
    on_too_long: str | None
    seed: int
    on_bad_row: str = "error"
    clean: Sequence[dict[str, Any]] = ()
    allow: Collection[str] = ()
    vocab_size: int | None = None
    untrained: Collection[int] = ()
    class_weights: str | dict[str, float] | None = None
    report: Callable[[int], None] = lambda rows: None
    say: Callable[[str], None] = lambda what: None

    @cached_property
    def encoder(self) -> Encoder | TargetEncoder:
        return self._new_encoder()

    def _new_encoder(self) -> Encoder | TargetEncoder:
        if self.task == REWARD:
            return PairEncoder(self.tokenizer)
        if self.task in HEAD_TASKS:
            return TargetEncoder(self.tokenizer, self.task)
        return Encoder(self.tokenizer, self.train_on)

    @cached_property
    def _observer(self) -> Observer:
        return Observer(self.encoder, self.vocab_size, self.untrained)

    def read(self, source: Source) -> list[Example]:
        """The examples of a source. Raises UserError, naming the row, for what cannot be read."""
        return list(to_examples(read_rows(source), self.task, source.format, source.columns))

    def held_out(
        self, examples: Sequence[Example], classes: Classes | None = None
    ) -> list[tuple[Example, Document]]:
        """Documents to measure on, each with its row: those with a trained token, and never an
        error for length. classes: of the training rows. Raises UserError for a label that they
        lack."""
        policy, longest = self._held_out_policy, self.max_length_tokens
        encoder = self._new_encoder()
        documents = encoder(examples)
        if isinstance(encoder, TargetEncoder) and classes is not None:
            if encoder.many is not None and documents:
                classes.check_many(encoder.many, documents[0].where)
            documents = [classes.named(document, list(encoder.classes)) for document in documents]
        parts = (
            (example, document.part(start, stop))
            for example, document in zip(examples, documents, strict=True)
            for start, stop in pieces(
                len(document.ids), longest, policy, max(map(len, document.texts))
            )
        )
        return [(example, part) for example, part in parts if part.trained_tokens]

    @property
    def _held_out_policy(self) -> str:
        """What becomes of a held-out row that is too long: pairs are never cut."""
        return self.on_too_long or ("drop" if self.task == REWARD else "truncate")

    def prepare(
        self,
        train: Sequence[tuple[Source, float]],
        validation: Source | None,
        fraction: float | None,
    ) -> Prepared:
        """Read `train` (each source with how often its rows are seen in an epoch), hold out
        `validation` or a `fraction` of the training rows, and audit what remains."""
        stored = self._build([source for source, _ in train], self.clean)
        held = stored if validation is None else self._build([validation], ())
        removed = Removal(stored, np.arange(len(stored)))
        for step in self.clean:
            if step["step"] == "duplicates":
                removed(step, repeated(removed.keys))
            elif step["step"] == "near_duplicates":
                removed(step, (removed.table["flags"] & Flag.NEAR_DUPLICATE) > 0)
        held_N = np.arange(0 if validation is None else len(held))
        if fraction is not None:
            out = hold_out(removed.keys, fraction, self.seed)
            held_N, removed.rows_N = removed.rows_N[out], removed.rows_N[~out]
        for step in self.clean:
            if step["step"] == "leakage":
                removed(step, self._leaking(step, removed, held, held_N))
        return self._prepared(train, removed, held, held_N)

    def _prepared(
        self,
        train: Sequence[tuple[Source, float]],
        removed: Removal,
        held: StoredRows,
        held_N: np.ndarray,
    ) -> Prepared:
        stored, rows_N = removed.stored, removed.rows_N
        if len(held_N) > MOST_REFERENCES:
            self.say(
                f"of {len(held_N):,} held-out rows, {MOST_REFERENCES:,} are looked for in the "
                "training rows by their words; equal rows are looked for in all"
            )
        found = contamination(stored, rows_N, held, held_N)
        policy = self._held_out_policy
        documents = fitted(stored, rows_N, self.max_length_tokens, self.on_too_long)
        held_documents = fitted(held, held_N, self.max_length_tokens, policy)
        classes = find_classes(stored, rows_N)
        if classes is not None:
            classes.check_held_out(held, held_N)
            weights_C = classes.weights(self.class_weights)
            documents = replace(
                documents, classes_C=classes.of_store(stored), class_weights_C=weights_C
            )
            held_documents = replace(held_documents, classes_C=classes.of_store(held))
        weights = np.array([weight for _, weight in train])
        material = Material(
            stored=stored,
            rows_N=rows_N,
            held_keys=held.table["key"][held_N],
            rare=rare_rows(stored, rows_N),
            leaks=found.leaks_N,
            overlaps=found.overlaps_N,
            cleaning=[*stored.state["cleaning"], *removed.steps],
            bad_rows=stored.state["bad_rows"],
            bad_examples=stored.state["bad_examples"],
            padding_is_end=self._padding_is_end(),
        )
        by_check = rows_by_check(material, self.max_length_tokens)
        seen = audit(
            material,
            by_check,
            max_length_tokens=self.max_length_tokens,
            on_too_long=self.on_too_long,
            allow=self.allow,
            decode=self.tokenizer.decode,
        )
        return Prepared(
            documents=documents,
            weights=weights[stored.table["source"][documents.rows_N]],
            examples=Examples(stored, rows_N),
            validation=Examples(held, held_N),
            validation_documents=held_documents,
            audit=seen,
            found=found,
            by_check=by_check,
            classes=classes,
        )

    def _build(self, sources: Sequence[Source], clean: Sequence[dict[str, Any]]) -> StoredRows:
        return Build(
            sources=sources,
            task=self.task,
            encoder=self.encoder,
            observer=self._observer,
            clean=clean,
            on_bad_row=self.on_bad_row,
            report=self.report,
            say=self.say,
        ).stored()

    def _leaking(
        self, step: dict[str, Any], removed: Removal, held: StoredRows, held_N: np.ndarray
    ) -> np.ndarray:
        """Which of the rows are found in the validation rows, or in those of a file."""
        if step["against"] != "validation":
            held = self._build([PlainSource(step["against"])], ())
            held_N = np.arange(len(held))
        found = contamination(removed.stored, removed.rows_N, held, held_N, step["ngram"])
        same = np.isin(removed.keys, held.table["key"][held_N])
        return same | np.isin(removed.rows_N, [*found.leaks_N, *found.overlaps_N])

    def _padding_is_end(self) -> str | None:
        pad = self.tokenizer.pad_token_id
        same = pad is not None and pad in self._observer.stops
        return str(self.tokenizer.name_or_path) if same else None


class Removal:
    """Rows of a store, of which steps that look at many rows at once remove some. steps: what each
    removed."""

    def __init__(self, stored: StoredRows, rows_N: np.ndarray) -> None:
        self.stored, self.rows_N = stored, rows_N
        self.steps: list[dict[str, Any]] = []

    @property
    def table(self) -> np.ndarray:
        return self.stored.table[self.rows_N]

    @property
    def keys(self) -> np.ndarray:
        return self.stored.table["key"][self.rows_N]

    def __call__(self, step: dict[str, Any], gone_N: np.ndarray) -> None:
        gone = self.rows_N[gone_N]
        where = [self.stored.where(int(row)) for row in gone[:EXAMPLES_SHOWN]]
        self.steps.append(
            {"step": step["step"], "count": len(gone), "changed": 0, "examples": where}
        )
        self.rows_N = self.rows_N[~gone_N]
