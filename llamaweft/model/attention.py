"""Attention within documents: rotary positions, and causal attention segment by segment.

T: tokens   L: tokens of one segment   H: heads   K: key-value heads   D: head size
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from llamaweft.model.pack import Pack
from llamaweft.model.presets import LlamaConfig


class Attend(Protocol):
    """What mixes tokens: a pack when training, a cache when generating."""

    def __call__(self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        """Returns o_THD."""


def rotary_frequencies(config: LlamaConfig) -> Tensor:
    """The D/2 angular frequencies of the rotary embedding, in radians a position.

    With `rope_type: llama3`, wavelengths beyond the original context are stretched by `factor`,
    short ones kept, those between blended (Llama 3.1; transformers' modeling_rope_utils).
    `linear` divides every frequency by `factor`.
    """
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequency = 1.0 / config.rope_theta**exponent
    scaling = config.rope_scaling
    if scaling is None:
        return frequency
    if scaling["rope_type"] == "linear":
        return frequency / scaling["factor"]
    wavelength = 2 * math.pi / frequency
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    context = scaling["original_max_position_embeddings"]
    kept = ((context / wavelength - low) / (high - low)).clamp(0, 1)
    return frequency * (kept + (1 - kept) / scaling["factor"])


def rotary_tables(frequency: Tensor, positions_T: Tensor) -> tuple[Tensor, Tensor]:
    """cos_TD and sin_TD in fp32, in split-half form: both halves hold the same angles."""
    angle = positions_T[:, None].float() * frequency[None, :]
    angle_TD = torch.cat([angle, angle], dim=-1)
    return angle_TD.cos(), angle_TD.sin()


def rotate(x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Rotary embedding (Su et al., 2021): the pair (i, i + D/2) turned by its angle."""
    first, second = x_THD.chunk(2, dim=-1)
    turned_THD = torch.cat([-second, first], dim=-1)
    return x_THD * cos_TD[:, None, :] + turned_THD * sin_TD[:, None, :]


class PackAttention:
    """Causal attention of every document to itself and to the prefixes it shares."""

    def __init__(self, pack: Pack) -> None:
        self.lengths = pack.lengths
        self.ancestors = [pack.ancestors(segment) for segment in range(len(pack.lengths))]

    def __call__(self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        qs, ks, vs = (x.split(self.lengths) for x in (q_THD, k_TKD, v_TKD))
        outputs = []
        for segment, q_LHD in enumerate(qs):
            chain = [*self.ancestors[segment], segment]
            k_LKD = torch.cat([ks[s] for s in chain]) if len(chain) > 1 else ks[segment]
            v_LKD = torch.cat([vs[s] for s in chain]) if len(chain) > 1 else vs[segment]
            outputs.append(causal_attention(q_LHD, k_LKD, v_LKD))
        return torch.cat(outputs)


def causal_attention(q_LHD: Tensor, k_JKD: Tensor, v_JKD: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, each query seeing the keys up to its own place.

    The L queries are the last of the J >= L positions. Returns o_LHD.
    """
    queries, keys = len(q_LHD), len(k_JKD)
    q_HLD, k_KJD, v_KJD = (x.transpose(0, 1)[None] for x in (q_LHD, k_JKD, v_JKD))
    seen_LJ = None
    if keys > queries:
        seen_LJ = torch.ones(queries, keys, dtype=torch.bool, device=q_LHD.device)
        seen_LJ = seen_LJ.tril(keys - queries)
    o_HLD = F.scaled_dot_product_attention(
        q_HLD, k_KJD, v_KJD, attn_mask=seen_LJ, is_causal=seen_LJ is None, enable_gqa=True
    )
    return o_HLD[0].transpose(0, 1)
