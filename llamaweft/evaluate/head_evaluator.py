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
from llamaweft.data.cleaning import texts_of
from llamaweft.data.example import Example, Message, Preference, Span, Tags
from llamaweft.data.selection import lengths_of
from llamaweft.data.targets import REWARD
from llamaweft.errors import UserError
from llamaweft.evaluate.bootstrap import Parts, ratio, summarise
from llamaweft.evaluate.evaluator import Answer, Progress, in_batches
from llamaweft.evaluate.head_answers import SHARE_THAT_HOLDS, likeliest_stretch
from llamaweft.evaluate.head_metrics import HEAD_SCORES, OUTSIDE, accuracy, counted, moments
from llamaweft.evaluate.metrics import f1, squad_exact_match
from llamaweft.runtime import ALL_OF_IT, Share


@dataclass(frozen=True)
class Said:
    """What a head says of one row. loss: summed, and its weight. said, expected: classes, or a
    value, of a pair two; of an answer, none. text: as a person reads it. references: what it should
    be, one of them; SQuAD's measures take the best (Rajpurkar et al., 2016). Of a pair: its texts.
    """

    loss: tuple[float, float]
    said: np.ndarray
    expected: np.ndarray
    text: str
    references: tuple[str, ...]


@dataclass(frozen=True)
class HeadEvaluator:
    """Held-out documents and rows, in the same order, and how to measure on them.

    outputs: model and documents -> for each document its logits (at its labels, or at every token
    where answers are read off) and its loss in nats with the weight. share: what this process does
    of it, where several measure the same model.
    """

    task: str
    metrics: Sequence[str]
    documents: Sequence[Document]
    examples: Sequence[Example]
    tokenizer: Tokenizer
    classes: Classes | None
    outputs: Callable[[Any, list[Document]], list[tuple[Tensor, tuple[float, float]]]]
    micro_batch_tokens: int
    share: Share[Any] = ALL_OF_IT

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
        order = np.argsort(lengths_of(self.documents), kind="stable").tolist()
        batches = self.share.of(in_batches(order, self.documents, self.micro_batch_tokens))
        found: list[dict[int, Said]] = []
        for batch in batches:
            documents = [self.documents[i] for i in batch]
            outputs = zip(batch, documents, self.outputs(model, documents), strict=True)
            found.append(
                {
                    i: self._read(document, self.examples[i], logits.float().cpu(), loss)
                    for i, document, (logits, loss) in outputs
                }
            )
            if progress is not None:
                progress(sum(map(len, found)), sum(map(len, batches)))
        said = {i: one for of_batch in self.share.joined(found) for i, one in of_batch.items()}
        return [said[i] for i in range(len(order))]

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
            text = likeliest_stretch(self.tokenizer, example.target, logits).text
            return Said(loss, none, none, text, answers)
        if self.task == REWARD:
            assert isinstance(example.target, Preference)
            said = logits.squeeze(-1).numpy()  # of a pair, the better text's first
            text = f"chosen {said[0]:.4g}, rejected {said[1]:.4g} ({said[0] - said[1]:+.2g})"
            return Said(loss, said, target, text, (_both_sides(example.target),))
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
            case "accuracy" if self.task == REWARD:  # as trl counts: equal ones are not right
                return float(one.said[0] > one.said[1]), 1.0
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


def _both_sides(target: Preference) -> str:
    return f"chosen: {_words(target.chosen)}\nrejected: {_words(target.rejected)}"


def _words(messages: tuple[Message, ...]) -> str:
    return "\n".join(texts_of(Example("", messages)))


def _prompt(example: Example) -> str:
    target = example.target
    match target:
        case Preference():
            return _words(example.messages)
        case Tags():
            return " ".join(target.tokens)
        case Span():
            return target.question
    return example.text or ""
