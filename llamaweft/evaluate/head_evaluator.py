"""Measuring a model with a head on held-out rows: its loss, and what it says of each row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llamaweft.data.chat import Document, Tokenizer
from llamaweft.data.classes import Classes
from llamaweft.data.example import Example, Span, Tags
from llamaweft.data.selection import lengths_of
from llamaweft.errors import UserError
from llamaweft.evaluate.bootstrap import Parts, ratio, summarise
from llamaweft.evaluate.evaluator import Answer, Progress
from llamaweft.evaluate.head_metrics import HEAD_SCORES, OUTSIDE, accuracy, counted, moments
from llamaweft.evaluate.metrics import f1, squad_exact_match

LONGEST_ANSWER_TOKENS = 64
"""Of an answer that is read off a text."""

SHARE_THAT_HOLDS = 0.5
"""A class of several holds from this probability on."""


@dataclass(frozen=True)
class Said:
    """What a head says of one row. loss: summed, and its weight. said, expected: classes, or a
    value; of an answer, none. text: as a person reads it. references: what it should be, one of
    them; SQuAD's measures take the best (Rajpurkar et al., 2016)."""

    loss: tuple[float, float]
    said: np.ndarray
    expected: np.ndarray
    text: str
    references: tuple[str, ...]


@dataclass(frozen=True)
class HeadEvaluator:
    """Held-out documents and rows, in the same order, and how to measure on them.

    outputs: model and documents -> for each document its logits (at its labels, or at every token
    where answers are read off) and its loss in nats with the weight.
    """

    task: str
    metrics: Sequence[str]
    documents: Sequence[Document]
    examples: Sequence[Example]
    tokenizer: Tokenizer
    classes: Classes | None
    outputs: Callable[[Any, list[Document]], list[tuple[Tensor, tuple[float, float]]]]
    micro_batch_tokens: int

    def check(self) -> None:
        """Raises UserError when there is no row to measure on."""
        if not len(self.documents):
            raise UserError(
                "no held-out row is left to measure on; hold more rows out, or raise "
                "data.max_length_tokens"
            )

    def measure(self, model: Any, progress: Progress | None = None) -> dict[str, Any]:
        """{"metrics", "answers", "parts"} as `Evaluator.measure` gives them, and with classes
        "confusion": {"labels", "counts": rows by what was expected, columns by what was said}."""
        model.eval()
        said = self._said(model, progress)
        parts = {name: [self._row(name, one) for one in said] for name in self.metrics}
        values = {
            name: asdict(summarise(rows, HEAD_SCORES.get(name, ratio)))
            for name, rows in parts.items()
        }
        found: dict[str, Any] = {
            "metrics": values,
            "answers": [asdict(answer) for answer in self._answers(said)],
            "parts": {name: [[float(n) for n in row] for row in parts[name]] for name in parts},
        }
        if self.classes is not None and not self.classes.many:
            found["confusion"] = self._confusion(said)
        return found

    @torch.inference_mode()
    def _said(self, model: Any, progress: Progress | None) -> list[Said]:
        found: dict[int, Said] = {}
        batch: list[int] = []
        order = np.argsort(lengths_of(self.documents), kind="stable").tolist()
        for index in [*order, None]:
            tokens = sum(len(self.documents[i].ids) for i in batch)
            more = 0 if index is None else len(self.documents[index].ids)
            if batch and (index is None or tokens + more > self.micro_batch_tokens):
                documents = [self.documents[i] for i in batch]
                for i, document, (logits, loss) in zip(
                    batch, documents, self.outputs(model, documents), strict=True
                ):
                    found[i] = self._read(document, self.examples[i], logits.float().cpu(), loss)
                batch = []
                if progress is not None:
                    progress(len(found), len(order))
            if index is not None:
                batch.append(index)
        return [found[i] for i in range(len(order))]

    # --- what a head says ------------------------------------------------------------------------

    def _read(
        self, document: Document, example: Example, logits: Tensor, loss: tuple[float, float]
    ) -> Said:
        assert document.labels is not None
        target = document.labels["target"]
        if self.task == "question_answering":
            assert isinstance(example.target, Span)
            none = np.zeros(0)
            answers = example.target.answers or ("",)
            return Said(loss, none, none, self._answer(example, logits), answers)
        if self.task == "regression":
            value = logits[0].numpy()
            return Said(loss, value, target[:1], f"{value[0]:.4g}", (f"{target[0]:.4g}",))
        expected = target.astype(np.int64)
        expected = expected[expected >= 0]
        assert self.classes is not None
        if self.classes.many:
            holds = logits[0].sigmoid() >= SHARE_THAT_HOLDS
            said = np.flatnonzero(holds.numpy())
        else:
            said = logits.argmax(-1).numpy()
        return Said(loss, said, expected, self._named(said), (self._named(expected),))

    def _named(self, classes: np.ndarray) -> str:
        assert self.classes is not None
        names = self.classes.names
        between = " " if self.task == "token_classification" else ", "
        return between.join(names[c] for c in classes.tolist())

    def _answer(self, example: Example, logits_TC: Tensor) -> str:
        """The most likely stretch of the context; no text where the first token is likelier: as
        BERT reads SQuAD 2 (Devlin et al., 2019)."""
        span = example.target
        assert isinstance(span, Span)
        encoding = self.tokenizer.backend_tokenizer.encode(span.question, span.context)
        inside = [i for i, side in enumerate(encoding.sequence_ids) if side == 1]
        inside = [i for i in inside if i < len(logits_TC)]
        if not inside:
            return ""
        begin, end = logits_TC[inside, 0], logits_TC[inside, 1]
        count = len(inside)
        score = begin[:, None] + end[None, :]
        allowed = torch.ones(count, count).triu().tril(LONGEST_ANSWER_TOKENS - 1).bool()
        best = int(score.masked_fill(~allowed, -torch.inf).argmax())
        start, stop = inside[best // count], inside[best % count]
        if logits_TC[0].sum() > score.view(-1)[best]:
            return ""
        return str(span.context[encoding.offsets[start][0] : encoding.offsets[stop][1]]).strip()

    # --- what it comes to ------------------------------------------------------------------------

    def _row(self, metric: str, one: Said) -> Parts:
        match metric:
            case "loss":
                return one.loss
            case "exact_match":
                return max(squad_exact_match(one.text, answer)[0] for answer in one.references), 1.0
            case "f1":
                return max(f1(one.text, answer)[0] for answer in one.references), 1.0
            case "mae":
                return float(abs(one.said[0] - one.expected[0])), 1.0
            case "pearson":
                return moments(float(one.said[0]), float(one.expected[0]))
        assert self.classes is not None
        if metric == "accuracy":
            return accuracy(one.said, one.expected, self.classes.many)
        names = self.classes.names
        row = np.array(counted(one.said, one.expected, len(names), self.classes.many))
        if self.task == "token_classification" and OUTSIDE in names:
            row.reshape(3, -1)[:, names.index(OUTSIDE)] = 0
        return row.tolist()

    def _answers(self, said: Sequence[Said]) -> list[Answer]:
        return [
            Answer(example.where, _prompt(example), one.references[0], one.text)
            for example, one in zip(self.examples, said, strict=True)
        ]

    def _confusion(self, said: Sequence[Said]) -> dict[str, Any]:
        assert self.classes is not None
        names = self.classes.names
        counts = np.zeros((len(names), len(names)), np.int64)
        for one in said:
            np.add.at(counts, (one.expected, one.said), 1)
        return {"labels": names, "counts": counts.tolist()}


def _prompt(example: Example) -> str:
    target = example.target
    match target:
        case Tags():
            return " ".join(target.tokens)
        case Span():
            return target.question
    return example.text or ""
