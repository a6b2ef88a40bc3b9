"""What a head says of one row, in words and numbers: for `predict`, and for measuring answers.

T: tokens of a document   C: classes
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llamaweft.data.chat import Tokenizer
from llamaweft.data.classes import Classes
from llamaweft.data.example import Example, Labels, Span, Tags

LONGEST_ANSWER_TOKENS = 64
"""Of an answer that is read off a text."""

SHARE_THAT_HOLDS = 0.5
"""A class of several holds from this probability on."""


@dataclass(frozen=True)
class Stretch:
    """text: of the context, empty where the context does not say. start: its first character
    there, or None. score: the product of the probabilities of its two ends."""

    text: str
    start: int | None
    score: float


def likeliest_stretch(tokenizer: Tokenizer, span: Span, logits_TC: Tensor) -> Stretch:
    """The most likely stretch of the context; no text where the first token is likelier: as BERT
    reads SQuAD 2 (Devlin et al., 2019). Probabilities are those of the loss: over the document's
    tokens, of either end."""
    shares_TC = logits_TC.float().softmax(dim=0)
    none = Stretch("", None, float(shares_TC[0].prod()))
    encoding = tokenizer.backend_tokenizer.encode(span.question, span.context)
    inside = [i for i, side in enumerate(encoding.sequence_ids) if side == 1]
    inside = [i for i in inside if i < len(logits_TC)]
    if not inside:
        return none
    begin, end = logits_TC[inside, 0], logits_TC[inside, 1]
    count = len(inside)
    score = begin[:, None] + end[None, :]
    allowed = torch.ones(count, count).triu().tril(LONGEST_ANSWER_TOKENS - 1).bool()
    best = int(score.masked_fill(~allowed, -torch.inf).argmax())
    first, last = inside[best // count], inside[best % count]
    if logits_TC[0].sum() > score.view(-1)[best]:
        return none
    start, stop = encoding.offsets[first][0], encoding.offsets[last][1]
    text = span.context[start:stop]
    share = float(shares_TC[first, 0] * shares_TC[last, 1])
    return Stretch(text.strip(), start + len(text) - len(text.lstrip()), share)


def head_answer(
    task: str, classes: Classes | None, tokenizer: Tokenizer, example: Example, logits: Tensor
) -> dict[str, Any]:
    """What was asked and what the head says, as a row of `predict` has it. Labels are given as the
    training rows had them.

    logits: logits_NC at what the head reads; logits_TC of every token for question_answering.
    """
    target = example.target
    match target:
        case Span():
            found = likeliest_stretch(tokenizer, target, logits)
            asked = {"question": target.question, "context": target.context}
            return asked | {"answer": found.text, "start": found.start, "score": found.score}
        case Tags():
            assert classes is not None
            labels = [json.loads(label) for label in classes.labels]
            said = [labels[place] for place in logits.argmax(-1).tolist()]
            return {"tokens": list(target.tokens), "tags": said}
    asked = {"text": example.text or ""}
    if isinstance(target, Labels) and target.text_pair is not None:
        asked["text_pair"] = target.text_pair
    if task == "regression":
        return asked | {"value": float(logits[0, 0])}
    assert classes is not None
    labels = [json.loads(label) for label in classes.labels]
    shares_C = logits[0].sigmoid() if classes.many else logits[0].softmax(dim=-1)
    shares = shares_C.tolist()
    scores = dict(zip(classes.names, shares, strict=True))
    if classes.many:
        held = [label for label, p in zip(labels, shares, strict=True) if p >= SHARE_THAT_HOLDS]
        return asked | {"labels": held, "scores": scores}
    return asked | {"label": labels[int(shares_C.argmax())], "scores": scores}
