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
from llamaweft.evaluate.bootstrap import Parts, compare, summarise
from llamaweft.evaluate.curves import lower_is_better
from llamaweft.evaluate.imported_metrics import NoNumberError
from llamaweft.evaluate.metrics import LOSSES, Metric, answer_metric, score_of
from llamaweft.generate.generate import generate_batch
from llamaweft.runtime import ALL_OF_IT, Share

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

    metrics: names; all but those of LOSSES generate an answer for each row.
    loss_parts: model and documents -> for each document, (summed loss in nats, trained weight).
    max_rows: rows that answers are generated for, the first ones.
    micro_batch_tokens: tokens computed at once for the loss.
    cache_bytes: tells, when answers are generated, how much their keys and values may take.
    share: what this process does of it, where several measure the same model.
    """

    metrics: Sequence[str]
    documents: Sequence[Document]
    examples: Sequence[Example]
    tokenizer: Tokenizer
    loss_parts: Callable[[Any, list[Document]], Sequence[Parts]]
    max_rows: int
    max_new_tokens: int
    micro_batch_tokens: int
    cache_bytes: Callable[[], int]
    share: Share[Any] = ALL_OF_IT

    def check(self) -> None:
        """Raises UserError when a metric's library or module is missing, or when there is no row
        to measure a metric on."""
        answered = [name for name in self.metrics if name not in LOSSES]
        for name in answered:
            answer_metric(name)
        if answered and not self._chats():
            raise UserError(
                f"evaluation.metrics: {answered[0]} compares answers, and no held-out row ends "
                "with an assistant's answer; measure loss, or hold other rows out"
            )
        if not self.documents and set(LOSSES) & set(self.metrics):
            raise UserError(
                "evaluation.metrics: no held-out row has a trained token to take the loss on; "
                "hold other rows out"
            )

    def _chats(self) -> list[Example]:
        """The first `max_rows` rows that end with an answer."""
        chats = (e for e in self.examples if e.messages and e.messages[-1]["role"] == "assistant")
        return list(islice(chats, self.max_rows))

    def measure(self, model: Any, progress: Progress | None = None) -> dict[str, Any]:
        """{"metrics": each as {"value", "low", "high", "count"}, "answers": those behind them,
        "parts": for each metric what each row adds to it, as lists of floats; perplexity's are
        those of "loss"}. Raises UserError, with the row, where a user's metric gives no number.
        """
        model.eval()
        wanted = {name: answer_metric(name) for name in self.metrics if name not in LOSSES}
        answers = self.answers(model, progress) if wanted else []
        parts = {name: _parts(name, metric, answers) for name, metric in wanted.items()}
        if set(LOSSES) & set(self.metrics):
            parts["loss"] = [list(row) for row in self._losses(model)]
        results = {
            name: asdict(summarise(parts[parts_name(name)], score_of(name)))
            for name in self.metrics
        }
        return {
            "metrics": results,
            "answers": [asdict(answer) for answer in answers],
            "parts": parts,
        }

    def answers(self, model: Any, progress: Progress | None = None) -> list[Answer]:
        """The model's greedy answer to the last turn of each of the first `max_rows` chats."""
        chats = self.share.of(self._chats())
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
        return self.share.joined(
            [
                Answer(e.where, e.messages[-2]["content"], e.messages[-1]["content"], text)
                for e, text in zip(chats, texts, strict=True)
            ]
        )

    @torch.inference_mode()
    def _losses(self, model: Any) -> list[Parts]:
        order = np.argsort(lengths_of(self.documents), kind="stable").tolist()
        batches = in_batches(order, self.documents, self.micro_batch_tokens)
        found = [
            list(self.loss_parts(model, [self.documents[i] for i in batch]))
            for batch in self.share.of(batches)
        ]
        return [row for rows in self.share.joined(found) for row in rows]


def in_batches(
    order: Sequence[int], documents: Sequence[Document], most_tokens: int
) -> list[list[int]]:
    """Documents by their indices, in this order, in batches of at most so many tokens; one that is
    longer is a batch of its own."""
    lengths = lengths_of(documents)
    batches: list[list[int]] = []
    room = 0
    for index in order:
        if not batches or lengths[index] > room:
            batches.append([])
            room = most_tokens
        batches[-1].append(index)
        room -= lengths[index]
    return batches


def side_by_side(before: dict[str, Any], after: dict[str, Any] | None) -> dict[str, Any]:
    """The content of evaluation.json from what `measure` returned on the same rows: both sides'
    metrics, some of the answers beside each other, and the paired test of each metric.

    Without `after` there is one side only. Without "parts" on both sides there is no test.
    """
    answers = before["answers"]
    others = answers if after is None else after["answers"]
    pairs = list(zip(answers, others, strict=True))
    shown = pairs[:: max(1, len(pairs) // EXAMPLES_SHOWN)][:EXAMPLES_SHOWN]
    content: dict[str, Any] = {
        "name": "held-out rows",
        "before": {"metrics": before["metrics"]},
        "after": None if after is None else {"metrics": after["metrics"]},
        "examples": [_example(b, None if after is None else a) for b, a in shown],
    }
    if "confusion" in before:
        sides = {"before": before["confusion"]}
        if after is not None:
            sides["after"] = after["confusion"]
        content["confusion"] = sides
    if after is not None and "parts" in before and "parts" in after:
        content["difference"] = _differences(before, after)
    return content


def _example(before: dict[str, Any], after: dict[str, Any] | None) -> dict[str, Any]:
    kept = {key: before[key] for key in ("where", "prompt", "reference")}
    return (
        kept | {"before": before["answer"]} | ({} if after is None else {"after": after["answer"]})
    )


def _differences(before: dict[str, Any], after: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The paired test of each metric that both sides have on the same rows.

    Two tokenizers cut rows into other tokens, so their losses are no pairs: there, the trained
    weights of the documents differ.
    """
    found = {}
    for name in before["metrics"]:
        old, new = (side["parts"].get(parts_name(name), []) for side in (before, after))
        same = len(old) == len(new) > 0
        if same and name in LOSSES:
            same = np.allclose([row[1] for row in old], [row[1] for row in new], rtol=1e-9)
        if same:
            lower = lower_is_better(name)
            found[name] = asdict(compare(old, new, score_of(name), lower_is_better=lower))
    return found


def parts_name(metric: str) -> str:
    """Under which name `measure` gives what rows add to a metric."""
    return "loss" if metric in LOSSES else metric


def _parts(name: str, metric: Metric, answers: Sequence[Answer]) -> list[list[float]]:
    rows = []
    for answer in answers:
        try:
            row = metric.row(answer.answer, answer.reference)
        except NoNumberError as error:
            raise UserError(
                f"evaluation.metrics: {name} {error} on the row {answer.where}; return a number "
                "for every pair of texts"
            ) from error
        rows.append([float(number) for number in row])
    return rows
