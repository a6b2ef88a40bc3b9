"""Measuring a model on held-out rows: its loss, and its answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch

from llamaweft.data.chat import Document, Encoder, Tokenizer, stop_ids
from llamaweft.data.example import Example
from llamaweft.data.selection import lengths_of
from llamaweft.errors import UserError
from llamaweft.evaluate.metrics import ANSWER_METRICS, Parts, summarise
from llamaweft.generate.generate import generate_batch

Progress = Callable[[int, int], None]
EXAMPLES_SHOWN = 20


@dataclass(frozen=True)
class Answer:
    """One held-out prompt with what was expected and what the model said."""

    where: str
    prompt: str
    reference: str
    answer: str


@dataclass(frozen=True)
class Evaluator:
    """Held-out documents and how to measure on them.

    metrics: names; those of ANSWER_METRICS generate an answer for each row.
    loss_parts: model and documents -> for each document, (summed loss in nats, trained weight).
    max_rows: rows that answers are generated for, the first ones.
    micro_batch_tokens: tokens computed at once for the loss.
    cache_bytes: tells, when answers are generated, how much their keys and values may take.
    """

    metrics: Sequence[str]
    documents: Sequence[Document]
    examples: Sequence[Example]
    tokenizer: Tokenizer
    loss_parts: Callable[[Any, list[Document]], list[Parts]]
    max_rows: int
    max_new_tokens: int
    micro_batch_tokens: int
    cache_bytes: Callable[[], int]

    def check(self) -> None:
        """Raises UserError when there is no row to measure a metric on."""
        answered = [name for name in self.metrics if name in ANSWER_METRICS]
        if answered and not self._chats():
            raise UserError(
                f"evaluation.metrics: {answered[0]} compares answers, and no held-out row ends "
                "with an assistant's answer; measure loss, or hold other rows out"
            )
        if not self.documents and {"loss", "perplexity"} & set(self.metrics):
            raise UserError(
                "evaluation.metrics: no held-out row has a trained token to take the loss on; "
                "hold other rows out"
            )

    def _chats(self) -> list[Example]:
        """The first `max_rows` rows that end with an answer."""
        chats = (e for e in self.examples if e.messages and e.messages[-1]["role"] == "assistant")
        return list(islice(chats, self.max_rows))

    def measure(self, model: Any, progress: Progress | None = None) -> dict[str, Any]:
        """{"metrics": each as {"value", "low", "high", "count"}, "answers": those behind them}."""
        model.eval()
        results: dict[str, dict[str, float]] = {}
        wanted = [name for name in self.metrics if name in ANSWER_METRICS]
        answers = self.answers(model, progress) if wanted else []
        losses = self._losses(model) if {"loss", "perplexity"} & set(self.metrics) else []
        for name in self.metrics:
            match name:
                case "loss":
                    value = summarise(losses)
                case "perplexity":
                    value = summarise(losses, np.exp)
                case _:
                    measure = ANSWER_METRICS[name]
                    value = summarise([measure(a.answer, a.reference) for a in answers])
            results[name] = asdict(value)
        return {"metrics": results, "answers": [asdict(answer) for answer in answers]}

    def answers(self, model: Any, progress: Progress | None = None) -> list[Answer]:
        """The model's greedy answer to the last turn of each of the first `max_rows` chats."""
        chats = self._chats()
        encoder = Encoder(self.tokenizer)
        prompts = [encoder.prompt_ids(replace(e, messages=e.messages[:-1])) for e in chats]
        generated = generate_batch(
            model,
            prompts,
            stop_ids(self.tokenizer),
            max_new_tokens=self.max_new_tokens,
            cache_bytes=self.cache_bytes(),
            progress=None if progress is None else lambda done: progress(done, len(chats)),
        )
        texts = [self.tokenizer.decode(found.ids, skip_special_tokens=True) for found in generated]
        return [
            Answer(e.where, e.messages[-2]["content"], e.messages[-1]["content"], text)
            for e, text in zip(chats, texts, strict=True)
        ]

    @torch.inference_mode()
    def _losses(self, model: Any) -> list[Parts]:
        parts: list[Parts] = []
        batch: list[Document] = []
        for index in np.argsort(lengths_of(self.documents), kind="stable").tolist():
            document = self.documents[index]
            tokens = sum(len(d.ids) for d in batch)
            if batch and tokens + len(document.ids) > self.micro_batch_tokens:
                parts += self.loss_parts(model, batch)
                batch = []
            batch.append(document)
        return parts + self.loss_parts(model, batch)


def side_by_side(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """The content of evaluation.json from two measurements {"metrics", "answers"} on the same
    rows: both sides' metrics, and some of the answers beside each other."""
    pairs = list(zip(before["answers"], after["answers"], strict=True))
    shown = pairs[:: max(1, len(pairs) // EXAMPLES_SHOWN)][:EXAMPLES_SHOWN]
    return {
        "name": "held-out rows",
        "before": {"metrics": before["metrics"]},
        "after": {"metrics": after["metrics"]},
        "examples": [
            {
                "where": b["where"],
                "prompt": b["prompt"],
                "reference": b["reference"],
                "before": b["answer"],
                "after": a["answer"],
            }
            for b, a in shown
        ],
    }
