"""The next token from logits: greedy, or drawn at a temperature from the likely ones.

B: sequences   V: vocabulary
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy. top_p: the smallest set of tokens with this probability
    (nucleus sampling: Holtzman et al., 2019). top_k: at most so many tokens; 0 is no limit."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0


def sample(logits_BV: Tensor, sampling: Sampling, generator: torch.Generator | None) -> Tensor:
    """One token id for each row (int64, B)."""
    if sampling.temperature == 0:
        return logits_BV.argmax(dim=-1)
    scaled_BV = logits_BV.float() / sampling.temperature
    sorted_BV, ids_BV = scaled_BV.sort(dim=-1, descending=True)
    if sampling.top_k:
        sorted_BV[:, sampling.top_k :] = -torch.inf
    probability_BV = sorted_BV.softmax(dim=-1)
    before_BV = probability_BV.cumsum(dim=-1) - probability_BV
    unlikely_BV = before_BV >= sampling.top_p
    unlikely_BV[:, 0] = False  # the likeliest token can always be drawn
    probability_BV[unlikely_BV] = 0
    drawn_B1 = torch.multinomial(probability_BV, 1, generator=generator)
    return ids_BV.gather(1, drawn_B1).squeeze(1)
