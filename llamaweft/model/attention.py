"""Attention within documents: rotary positions, and causal attention segment by segment.

T: tokens   R: rows with a query   H: heads   K: key-value heads   D: head size
"""

from __future__ import annotations

import math
from itertools import accumulate, pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from llamaweft.model.flash import Piece, attend_on_cuda, attention_backward, flash_forward
from llamaweft.model.pack import Pack
from llamaweft.model.presets import LlamaConfig


class Attend(Protocol):
    """What mixes tokens: a pack when training, a cache when generating."""

    def __call__(self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, /) -> Tensor:
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


class _Rotate(torch.autograd.Function):
    """The rotation and its transpose, the rotation by the opposite angle."""

    @staticmethod
    def forward(ctx: Any, x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
        ctx.save_for_backward(cos_TD, sin_TD)
        return _turned(x_THD, cos_TD, sin_TD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos_TD, sin_TD = ctx.saved_tensors
        return _turned(grads[0], cos_TD, -sin_TD), None, None


def _turned(x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    half = x_THD.shape[-1] // 2
    cos, sin = cos_TD[:, None, :half], sin_TD[:, None, :half]
    first, second = x_THD[..., :half], x_THD[..., half:]
    turned = torch.empty_like(x_THD)
    torch.mul(first, cos, out=turned[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=turned[..., half:]).addcmul_(first, sin)
    return turned


def rotate(x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Rotary embedding (Su et al., 2021): the pair (i, i + D/2) turned by its angle."""
    return _Rotate.apply(x_THD, cos_TD, sin_TD)


class PackAttention:
    """Causal attention of every document to itself and to the prefixes it shares.

    rows_R: the positions whose output is wanted, ascending; None: all of them. Queries are then
    given for these rows only.
    """

    def __init__(self, pack: Pack, rows_R: Tensor | None = None) -> None:
        self.pieces = pieces_of(pack, None if rows_R is None else rows_R.tolist())

    def __call__(
        self,
        layer: int,
        q_RHD: Tensor,
        k_TKD: Tensor,
        v_TKD: Tensor,
        given: tuple[Tensor, list[Tensor]] | None = None,
    ) -> Tensor:
        """o_RHD. given: what `normalised` returned, where it was kept."""
        if q_RHD.is_cuda:
            return attend_on_cuda(q_RHD, k_TKD, v_TKD, self.pieces)
        return _Attention.apply(q_RHD, k_TKD, v_TKD, self.pieces, given)

    def normalised(
        self, q_RHD: Tensor, k_TKD: Tensor, v_TKD: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """o_RHD, and the log-normalisers of each piece, without gradient. CPU only."""
        return flash_forward(q_RHD, k_TKD, v_TKD, self.pieces)


def pieces_of(pack: Pack, rows: list[int] | None) -> list[Piece]:
    """A piece for each segment, or for each run of consecutive rows within one."""
    pieces: list[Piece] = []
    starts = [0, *accumulate(pack.lengths)]
    segments = [slice(a, b) for a, b in pairwise(starts)]
    if rows is None:
        runs = [(s.start, s.stop, index) for index, s in enumerate(segments)]
    else:
        runs = _runs(rows, pack.segment_T.tolist())
    done = 0
    for start, stop, segment in runs:
        before = [segments[s] for s in pack.ancestors(segment)]
        if start > segments[segment].start:
            before.append(slice(segments[segment].start, start))
        pieces.append(Piece(slice(done, done + stop - start), before, slice(start, stop)))
        done += stop - start
    return pieces


def _runs(rows: list[int], segment_T: list[int]) -> list[tuple[int, int, int]]:
    """(start, stop, segment) of each run of consecutive rows of one segment."""
    runs: list[tuple[int, int, int]] = []
    for row in rows:
        if runs and runs[-1][1] == row and runs[-1][2] == segment_T[row]:
            runs[-1] = (runs[-1][0], row + 1, segment_T[row])
        else:
            runs.append((row, row + 1, segment_T[row]))
    return runs


class _Attention(torch.autograd.Function):
    """Attention on a CPU; `given` skips the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        q_RHD: Tensor,
        k_TKD: Tensor,
        v_TKD: Tensor,
        pieces: list[Piece],
        given: tuple[Tensor, list[Tensor]] | None,
    ) -> Tensor:
        o_RHD, normalisers = given or flash_forward(q_RHD, k_TKD, v_TKD, pieces)
        ctx.pieces, ctx.normalisers = pieces, normalisers
        ctx.save_for_backward(q_RHD, k_TKD, v_TKD, o_RHD)
        return o_RHD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, o = ctx.saved_tensors
        return *attention_backward(grads[0], q, k, v, o, ctx.normalisers, ctx.pieces), None, None
