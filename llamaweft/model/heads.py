"""Output heads. Each owns its loss, as (sum, count), and never holds all logits.

N: labels   C: labels of one tile   E: hidden size   V: vocabulary
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from llamaweft.model.pack import Pack
from llamaweft.weights.frozen import FrozenWeight, tile_size
from llamaweft.weights.grown import GrownWeight
from llamaweft.weights.linear import Linear, local
from llamaweft.weights.matmul import (
    add_product,
    padded,
    product_in_columns,
    summed_over_tokens,
)

TILE_LABELS = 256
"""Labels of one tile of fp32 logits, where the Schedule does not say. The more, the faster the
products (docs/log.md)."""

VOCABULARY_TILE = 16384
"""Rows of the head that are multiplied at once on a GPU."""

CACHED_ROWS = 1024
"""Rows of logits that are worked on at once: few enough for a cache."""

Weight = Tensor | FrozenWeight | GrownWeight


class Vocabulary(Protocol):
    """Where a head holds some rows of the vocabulary only: how processes join what they find."""

    @property
    def size(self) -> int:
        """Rows of the whole vocabulary."""

    def highest(self, values: Tensor) -> Tensor:
        """The elementwise largest over the processes, in place."""

    def total(self, values: Tensor) -> Tensor:
        """The sum over the processes, in place."""

    def local(self, target_C: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """The places of target ids among the rows that are here, and whether they are."""


@dataclass(frozen=True)
class WholeVocabulary:
    """All rows are here."""

    size: int

    def highest(self, values: Tensor) -> Tensor:
        return values

    def total(self, values: Tensor) -> Tensor:
        return values

    def local(self, target_C: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        return target_C, torch.ones_like(target_C, dtype=torch.bool)


class CausalLMHead(Linear):
    """Next-token logits, and their cross-entropy on labelled positions only.

    label_smoothing: share of a target's probability that goes to all of the vocabulary, in training
    (Szegedy et al., 2016; torch's `cross_entropy`)."""

    label_smoothing = 0.0
    vocabulary: Vocabulary | None = None
    """Set where other processes hold other rows."""

    def _parts(self) -> tuple[Weight, Vocabulary]:
        """The rows that are here, and how they are a part of all."""
        weight = local(self.weight)
        return weight, self.vocabulary or WholeVocabulary(weight.shape[0])

    def loss(
        self, hidden_NE: Tensor, pack: Pack, tile_labels: int = TILE_LABELS
    ) -> tuple[Tensor, Tensor]:
        """sum_n weight_n * -log softmax(h_n W^T)[target_n], and sum_n weight_n, in fp32.

        hidden_NE: the hidden state of each label, in the order of the pack's labels.
        tile_labels: labels whose logits are held at once.
        """
        weight, vocabulary = self._parts()
        total = _TiledCrossEntropy.apply(
            hidden_NE,
            _trained_rows(weight)[0],
            weight,
            vocabulary,
            pack.label_target_N,
            pack.label_weight_N,
            tile_labels,
            self.label_smoothing,
        )
        return total, pack.label_weight_N.sum()

    @torch.no_grad()
    def label_losses(self, hidden_NE: Tensor, pack: Pack) -> Tensor:
        """-log softmax(h_n W^T)[target_n] of each label, without gradient: loss_N in fp32."""
        targets = pack.label_target_N
        found = [
            _exponentials(hidden_NE[rows], *self._parts(), targets[rows])[2]
            for rows in _label_tiles(len(targets), TILE_LABELS)
        ]
        return torch.cat(found) if found else hidden_NE.new_zeros(0, dtype=torch.float32)

    @torch.no_grad()
    def likeliest(self, hidden_NE: Tensor, pack: Pack) -> tuple[Tensor, Tensor]:
        """`label_losses`, and for each label whether its target is the likeliest token."""
        losses, hits = [], []
        weight, vocabulary = self._parts()
        for rows in _label_tiles(len(hidden_NE), TILE_LABELS):
            target_C = pack.label_target_N[rows]
            exp_VC, _, loss_C = _exponentials(hidden_NE[rows], weight, vocabulary, target_C)
            losses.append(loss_C)
            place_C, here_C = vocabulary.local(target_C, len(exp_VC))
            likeliest_C = here_C & (exp_VC.argmax(dim=0) == place_C)
            likeliest_C &= exp_VC.amax(dim=0) == 1  # of all processes' rows: exp(0)
            hits.append(vocabulary.total(likeliest_C.float()) > 0)
        return torch.cat(losses), torch.cat(hits)


def _label_tiles(labels: int, most: int) -> list[slice]:
    """The labels in tiles of like size."""
    count = -(-labels // most)
    edges = [labels * i // max(count, 1) for i in range(count + 1)]
    return [slice(a, b) for a, b in pairwise(edges)]


def _trained_rows(weight: Weight) -> tuple[Tensor | None, slice]:
    """What is trained of a weight, and which rows of the vocabulary that is."""
    if isinstance(weight, GrownWeight):
        return weight.new_NE, weight.span
    return (weight if isinstance(weight, Tensor) else None), slice(None)


def _vocabulary_tiles(weight: Weight, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """(rows, w_rows in `dtype`), valid until the next one."""
    if not isinstance(weight, GrownWeight):
        yield from _tiles(weight, slice(0, weight.shape[0]), dtype)
        return
    yield weight.span, weight.new_NE.detach().to(dtype)
    for of_base in weight.of_base:
        yield from _tiles(weight.base, of_base, dtype)


def _tiles(
    weight: Tensor | FrozenWeight, part: slice, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """Those of one part of the rows."""
    on_cpu = weight.device.type == "cpu"
    size = 2 * tile_size(weight.shape[1], dtype) if on_cpu else VOCABULARY_TILE
    tiles = [slice(a, min(a + size, part.stop)) for a in range(part.start, part.stop, size)]
    if isinstance(weight, FrozenWeight) and on_cpu:
        for rows in tiles:
            yield rows, weight.rows(rows.start, rows.stop, dtype)
        return
    if isinstance(weight, FrozenWeight):
        whole = weight.dequantised(dtype)
    else:
        whole = weight.detach().to(dtype)
    for rows in tiles:
        yield rows, whole[rows]


def _exponentials(
    hidden_CE: Tensor,
    weight: Weight,
    vocabulary: Vocabulary,
    target_C: Tensor,
    smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """exp(logit - largest)_VC in fp32, made in place of the logits, its sums over the vocabulary
    sum_1C, and loss_C. Over each other they are the softmax.

    The vocabulary comes first, so that each tile of the head writes memory of its own; and what is
    done to a tile is done while it is in the cache.
    """
    logits_VC = hidden_CE.new_empty(weight.shape[0], len(hidden_CE), dtype=torch.float32)
    largest_1C = logits_VC.new_full((1, len(hidden_CE)), -torch.inf)
    total_1C = torch.zeros_like(largest_1C)
    padded_CE = padded(hidden_CE)
    for rows, w in _vocabulary_tiles(weight, hidden_CE.dtype):
        product_in_columns(w, padded_CE.t(), out=logits_VC[rows])
        largest_1C = torch.maximum(largest_1C, logits_VC[rows].amax(dim=0, keepdim=True))
        if smoothing:
            total_1C += logits_VC[rows].sum(dim=0, keepdim=True)
    largest_1C = vocabulary.highest(largest_1C)
    place_C, here_C = vocabulary.local(target_C, len(logits_VC))
    target_1C = logits_VC.gather(0, place_C[None]).masked_fill_(~here_C, 0)
    target_1C = vocabulary.total(target_1C)
    if smoothing:
        target_1C = target_1C.lerp(vocabulary.total(total_1C) / vocabulary.size, smoothing)
    sum_1C = torch.zeros_like(largest_1C)
    for part_VC in logits_VC.split(CACHED_ROWS):
        sum_1C += part_VC.sub_(largest_1C).exp_().sum(dim=0, keepdim=True)
    sum_1C = vocabulary.total(sum_1C)
    return logits_VC, sum_1C, (sum_1C.log() + largest_1C - target_1C).squeeze(0)


class _TiledCrossEntropy(torch.autograd.Function):
    """Linear layer and cross-entropy in one, tile by tile over the labels.

    The gradient of a tile's logits is known as soon as its loss is: softmax - onehot. So the
    forward pass computes it at once and keeps grad_h (and, where W is trained, grad_W) instead
    of logits. The idea is that of Liger-Kernel's fused linear cross-entropy.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NE: Tensor,
        trained_VE: Tensor | None,
        weight: Weight,
        vocabulary: Vocabulary,
        target_N: Tensor,
        weight_N: Tensor,
        tile_labels: int,
        smoothing: float,
    ) -> Tensor:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_NE = torch.empty_like(hidden_NE) if wants_hidden else None
        grad_VE = torch.zeros_like(trained_VE) if wants_weight else None  # type: ignore[arg-type]
        trained_rows = _trained_rows(weight)[1]
        total = torch.zeros((), dtype=torch.float32, device=hidden_NE.device)
        for rows in _label_tiles(len(target_N), tile_labels):
            target_C, weight_C = target_N[rows], weight_N[rows]
            grad_VC, sum_1C, loss_C = _exponentials(
                hidden_NE[rows], weight, vocabulary, target_C, smoothing
            )
            total += (loss_C * weight_C).sum()
            if grad_NE is None and grad_VE is None:
                continue
            # weight (softmax - onehot), the division and the weight left to each tile below.
            place_C, here_C = vocabulary.local(target_C, len(grad_VC))
            grad_VC.scatter_add_(0, place_C[None], (smoothing - 1) * sum_1C * here_C)
            each = smoothing / vocabulary.size
            if grad_NE is None:
                _scaled(grad_VC, sum_1C, weight_C, each)
            else:
                found = _back_to_hidden(grad_VC, sum_1C, weight_C, each, weight, hidden_NE.dtype)
                grad_NE[rows] = vocabulary.total(found)
            if grad_VE is not None:
                grad_CV = grad_VC[trained_rows].t().to(hidden_NE.dtype)
                grad_VE += summed_over_tokens(grad_CV, hidden_NE[rows])
        ctx.save_for_backward(grad_NE, grad_VE)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scale = grads[0]
        grad_NE, grad_VE = ctx.saved_tensors
        return (
            None if grad_NE is None else grad_NE * scale.to(grad_NE.dtype),
            None if grad_VE is None else grad_VE * scale,
            None,
            None,
            None,
            None,
            None,
            None,
        )


def _scaled(part_VC: Tensor, sum_1C: Tensor, weight_C: Tensor, each: float) -> Tensor:
    """weight (part / sum - each), in place."""
    part_VC.mul_(weight_C / sum_1C)
    return part_VC.sub_(each * weight_C) if each else part_VC


def _back_to_hidden(
    grad_VC: Tensor,
    sum_1C: Tensor,
    weight_C: Tensor,
    each: float,
    weight: Weight,
    dtype: torch.dtype,
) -> Tensor:
    """grad_CE = grad_VC^T W, summed in fp32 over tiles of the vocabulary, each of which is scaled
    in place first."""
    grad_CE = grad_VC.new_zeros(grad_VC.shape[1], weight.shape[1])
    for rows, w in _vocabulary_tiles(weight, dtype):
        grad_C = _scaled(grad_VC[rows], sum_1C, weight_C, each).t()
        add_product(grad_CE, grad_C.to(dtype), w)
    return grad_CE
