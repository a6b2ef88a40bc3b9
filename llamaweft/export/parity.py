"""Proof that an exported model answers like the one that was trained.

What is expected is computed first, by our own model, and kept as a few rows of logits; then our
model is freed, and the export's real consumer says the same rows (export/consumers.py,
export/llama_cpp.py). So the proof never holds two models.

P: positions that are compared   V: vocabulary   C: outputs of a head   T: tokens
E: hidden size
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llamaweft.model.attention import PackAttention
from llamaweft.model.llama import LlamaWithHead, Model
from llamaweft.model.pack import Pack

TOLERANCES = {
    "peft": 1e-4,
    "hf fp32": 1e-4,
    "hf bf16": 5e-2,
    "head": 1e-5,
    "gguf f32": 1e-3,
    "gguf f16": 1e-2,
    "gguf bf16": 5e-2,
    "gguf q8_0": 0.1,
    "gguf q5_1": 0.5,
    "gguf q5_0": 0.5,
    "gguf q4_1": 0.7,
    "gguf q4_0": 0.7,
}
"""Largest norm of the difference of the logits over their norm, by what is written. docs/export.md
says why each is what it is, and what was measured."""

COMPUTED_IN_BF16 = 0.1
"""The same where the consumer computes in bf16, since fp32 does not fit into memory."""

POSITIONS = 64
"""Positions of a document that are compared; each is a row of the vocabulary."""

ROWS = 16
"""Of these that are compared at once."""


@dataclass(frozen=True)
class Parity:
    """consumer: what opened the export. compared_with: what it must answer like. computed_in: dtype
    of the consumer's products. merged_into: original or dequantised weights; None where nothing was
    merged. relative_difference: norm of the difference of the logits over their norm.
    max_difference: of a single logit. kl: mean KL divergence of the next-token distributions, in
    nats. same_greedy_tokens: share of equal argmaxes. tokens: positions compared. kl_to_live: the
    same KL from the model as it was trained, where that is not what it was compared with; it
    decides nothing. texts: of which the tokenizer's ids were compared; other_ids: those that
    differ.
    """

    consumer: str
    compared_with: str
    computed_in: str
    merged_into: str | None
    relative_difference: float
    max_difference: float
    kl: float
    same_greedy_tokens: float
    tokens: int
    tolerance: float
    kl_to_live: float | None = None
    texts: int = 0
    other_ids: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return self.relative_difference <= self.tolerance and not self.other_ids

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"other_ids": list(self.other_ids), "passed": self.passed}

    @property
    def why(self) -> str:
        """What made it fail."""
        if self.other_ids:
            count = len(self.other_ids)
            return (
                f"its tokenizer reads {count} of {self.texts} texts otherwise, the first is "
                f"{self.other_ids[0]!r}"
            )
        return (
            f"the logits differ by {self.relative_difference:.1e}, allowed is {self.tolerance:.0e}"
        )


@dataclass(frozen=True)
class Difference:
    """Two lists of logits beside each other; the fields are Parity's."""

    relative_difference: float
    max_difference: float
    kl: float
    same_greedy_tokens: float
    tokens: int


def auto_class(model: Model) -> str:
    """The class of transformers that opens such a model."""
    if not isinstance(model, LlamaWithHead):
        return "AutoModelForCausalLM"
    return model.head_config.architecture.replace("Llama", "AutoModel")


def compared_positions(tokens: int) -> Tensor:
    """Where a text of so many tokens is compared: everywhere, or evenly spread, with the last."""
    count = min(tokens, POSITIONS)
    return torch.linspace(0, tokens - 1, count).round().long()


@torch.inference_mode()
def our_logits(model: Model, prompts: Sequence[np.ndarray]) -> list[Tensor]:
    """What our model says of each prompt, in fp32 whatever it was trained in, on the CPU: logits_PV
    at `compared_positions`, or of a head logits_TC at every token."""
    model.eval()
    before, model.model.compute_dtype = model.model.compute_dtype, torch.float32
    try:
        return [_said(model, ids) for ids in prompts]
    finally:
        model.model.compute_dtype = before


def _said(model: Model, ids: np.ndarray) -> Tensor:
    hidden_TE = hidden_states(model, ids)
    if isinstance(model, LlamaWithHead):
        return model.head(hidden_TE).cpu()
    places_P = compared_positions(len(ids)).to(model.device)
    return model.lm_head(hidden_TE[places_P]).float().cpu()


def hidden_states(model: Model, ids: np.ndarray) -> Tensor:
    """h_TE of a text, in the dtype that the model computes in."""
    pack = Pack.from_documents([_Tokens(ids)]).to(model.device)
    return model.model(pack.ids_T, pack.positions_T, PackAttention(pack))


def compare(
    expected: Sequence[Tensor], found: Sequence[Tensor], *, centred: bool = False
) -> Difference:
    """Rows of logits beside each other, prompt by prompt. centred: each row less its mean, for a
    consumer that tells probabilities, which fix logits but for a constant."""
    squares = squares_of_difference = largest = kl = 0.0
    same = tokens = 0
    for ours_PV, theirs_PV in _few_rows(expected, found):
        log_p_PV, log_q_PV = ours_PV.double().log_softmax(-1), theirs_PV.double().log_softmax(-1)
        kl += float((log_p_PV.exp() * (log_p_PV - log_q_PV)).sum())
        same += int((ours_PV.argmax(-1) == theirs_PV.argmax(-1)).sum())
        tokens += len(ours_PV)
        if centred:
            ours_PV = ours_PV - ours_PV.mean(-1, keepdim=True)
            theirs_PV = theirs_PV - theirs_PV.mean(-1, keepdim=True)
        difference_PV = ours_PV - theirs_PV
        largest = max(largest, float(difference_PV.abs().max()))
        squares += float(ours_PV.double().square().sum())
        squares_of_difference += float(difference_PV.double().square().sum())
    relative = (squares_of_difference / squares) ** 0.5 if squares else float("inf")
    return Difference(relative, largest, kl / tokens, same / tokens, tokens)


def _few_rows(
    expected: Sequence[Tensor], found: Sequence[Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """The same rows of both, some at a time: in fp64 a row of a large vocabulary is 1 MB."""
    for ours_PV, theirs_PV in zip(expected, found, strict=True):
        yield from zip(ours_PV.split(ROWS), theirs_PV.split(ROWS), strict=True)


@dataclass(frozen=True)
class Answers:
    """What a consumer says. name: of the consumer. logits: as `our_logits`. computed_in: the dtype
    of its products. pad: what its config pads with. given: the positions of each prompt that it
    says something of; None: all of `our_logits`. texts, other_ids: as Parity's."""

    name: str
    logits: list[Tensor]
    computed_in: str = "fp32"
    pad: int | None = None
    given: list[Tensor] | None = None
    centred: bool = False
    texts: int = 0
    other_ids: tuple[str, ...] = ()


@dataclass(frozen=True)
class Expected:
    """What an export must answer like, computed before it is opened.

    rows: as `our_logits`. live: those of the model as it was trained, where that is another.
    kind: what auto_class says. merged_into: as Parity's.
    """

    prompts: Sequence[np.ndarray]
    kind: str
    rows: list[Tensor]
    live: list[Tensor] | None = None
    merged_into: str | None = None

    @property
    def compared_with(self) -> str:
        if self.live is None:
            return "the model as it was trained"
        return "the original weights with the adapter"

    def beside(self, answers: Answers, tolerance: float) -> Parity:
        """The verdict on a consumer's answers."""
        ours = self._given(self.rows, answers)
        found = compare(ours, answers.logits, centred=answers.centred)
        kl_to_live = None
        if self.live is not None:
            of_live = compare(self._given(self.live, answers), answers.logits)
            kl_to_live = of_live.kl
        return Parity(
            consumer=answers.name,
            compared_with=self.compared_with,
            computed_in=answers.computed_in,
            merged_into=self.merged_into,
            tolerance=tolerance,
            kl_to_live=kl_to_live,
            texts=answers.texts,
            other_ids=answers.other_ids,
            **asdict(found),
        )

    def _given(self, rows: list[Tensor], answers: Answers) -> list[Tensor]:
        """The positions that the consumer speaks of: of a classifier of texts the last that is no
        padding."""
        if answers.given is not None:
            return [one[places] for one, places in zip(rows, answers.given, strict=True)]
        if self.kind != "AutoModelForSequenceClassification":
            return rows
        last = [int(np.flatnonzero(ids != answers.pad).max(initial=0)) for ids in self.prompts]
        return [one[at : at + 1] for one, at in zip(rows, last, strict=True)]


class _Tokens:
    """A document without labels."""

    def __init__(self, ids: np.ndarray) -> None:
        self.ids, self.weights = ids, np.zeros(len(ids), np.float32)
