"""What a model forgets while it learns, measured on general prompts against what it was before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from llamaweft.data.chat import Tokenizer, stop_ids
from llamaweft.data.general import General
from llamaweft.evaluate.bootstrap import compare, ratio, summarise
from llamaweft.generate.generate import generate_batch

KL, LOSS = "forgetting_kl", "forgetting_loss"
"""Names in metrics.jsonl, both in nats per token of the reference answers."""

STOP = "stop"
"""`forgetting.when_exceeded`: a run ends at its first evaluation over the budget."""

Progress = Callable[[int, int], None]


class ComparedLike(Protocol):
    """Sums over the labels of one prompt, in nats: KL(then || now), and the loss then and now."""

    @property
    def kl(self) -> float: ...

    @property
    def before(self) -> float: ...

    @property
    def after(self) -> float: ...

    @property
    def labels(self) -> int: ...


@dataclass(frozen=True)
class ForgettingGuard:
    """General prompts, and how much of what a model said to them may change.

    compare: a model -> each prompt's sums, against the model as it was. max_kl: the budget, in nats
    per token; None: only measured. answered: prompts that are answered side by side, of at most
    max_new_tokens. cache_bytes: tells what keys and values of answers may take.
    """

    general: General
    tokenizer: Tokenizer
    compare: Callable[[Any], Sequence[ComparedLike]]
    max_kl: float | None
    when_exceeded: str
    answered: int
    max_new_tokens: int
    cache_bytes: Callable[[], int]

    def measure(self, model: Any) -> dict[str, Any]:
        """{"metrics": those named KL and LOSS as {"value", "low", "high", "count"}, "parts": what
        each prompt adds to "kl", "before" and "after"}."""
        model.eval()
        parts = parts_of(self.compare(model))
        return {
            "metrics": {
                KL: asdict(summarise(parts["kl"])),
                LOSS: asdict(summarise(parts["after"])),
            },
            "parts": parts,
        }

    def within(self, metrics: dict[str, dict[str, float]]) -> bool:
        """Whether measured metrics keep the budget. What is no number does not."""
        return self.max_kl is None or metrics[KL]["value"] <= self.max_kl

    @property
    def stops(self) -> bool:
        return self.max_kl is not None and self.when_exceeded == STOP

    def answers(self, model: Any, progress: Progress | None = None) -> list[str]:
        """The model's greedy answers to `answered` prompts, spread over the areas."""
        model.eval()
        chosen = self._chosen
        found = generate_batch(
            model,
            [self.general.prompt_ids[i] for i in chosen],
            stop_ids(self.tokenizer),
            max_new_tokens=self.max_new_tokens,
            cache_bytes=self.cache_bytes(),
            progress=None if progress is None else lambda done: progress(done, len(chosen)),
        )
        return [self.tokenizer.decode(one.ids, skip_special_tokens=True) for one in found]

    @property
    def _chosen(self) -> list[int]:
        prompts = len(self.general.prompts)
        count = min(self.answered, prompts)
        return [prompts * i // count for i in range(count)]

    def side_by_side(self, before: Sequence[str], after: Sequence[str]) -> list[dict[str, Any]]:
        """What `answers` gave then and now, each pair with its prompt."""
        prompts = [self.general.prompts[i] for i in self._chosen]
        return [
            {
                "where": prompt.where,
                "prompt": prompt.prompt,
                "reference": prompt.answer,
                "before": old,
                "after": new,
            }
            for prompt, old, new in zip(prompts, before, after, strict=True)
        ]

    def content(
        self, measured: dict[str, Any], before: Sequence[str], after: Sequence[str]
    ) -> dict[str, Any]:
        """What evaluation.json holds under "forgetting". measured: what `measure` gave; before,
        after: what `answers` gave."""
        prompts = self.general.prompts
        areas = dict.fromkeys(prompt.area for prompt in prompts)
        return {
            "prompts": len(prompts),
            "tokens": self.general.labels,
            "max_kl": self.max_kl,
            "when_exceeded": None if self.max_kl is None else self.when_exceeded,
            **_tested(measured["parts"], range(len(prompts))),
            "areas": {
                area: _tested(
                    measured["parts"], [i for i, p in enumerate(prompts) if p.area == area]
                )
                for area in areas
            },
            "examples": self.side_by_side(before, after),
        }


def parts_of(rows: Sequence[ComparedLike]) -> dict[str, list[list[float]]]:
    """What each prompt adds to "kl", and to the loss "before" and "after": sum and labels."""
    return {
        name: [[float(getattr(row, name)), float(row.labels)] for row in rows]
        for name in ("kl", "before", "after")
    }


def _tested(parts: dict[str, list[list[float]]], rows: Sequence[int]) -> dict[str, Any]:
    """KL and loss of some prompts, with intervals over prompts and the paired test of the loss."""
    kl, before, after = ([parts[name][i] for i in rows] for name in ("kl", "before", "after"))
    return {
        "kl": asdict(summarise(kl)),
        "loss": {
            "before": asdict(summarise(before)),
            "after": asdict(summarise(after)),
            "difference": asdict(compare(before, after, ratio, lower_is_better=True)),
        },
    }


def forgetting_notes(content: dict[str, Any] | None, weights: str) -> list[str]:
    """What a person should know of evaluation.json's "forgetting" before all else. weights: the
    folder that holds what was trained."""
    if content is None or content["max_kl"] is None:
        return []
    budget = f"forgetting.max_kl: {content['max_kl']:g} nats per token"
    notes = []
    if (stopped := content.get("stopped_at_step")) is not None:
        notes.append(f"the run was ended at step {stopped}, since it forgot more than {budget}")
    if content.get("step") == 0:
        notes.append(
            f"no evaluation kept within {budget}, so {weights} holds the model as the run began: "
            "nothing that was learnt; lower training.learning_rate, train less, or raise the budget"
        )
    return notes
