"""Output heads. Each owns its loss, as (sum, count), and never holds all logits.

T: tokens   N: labels   C: labels of one tile   E: hidden size   V: vocabulary
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from llamaweft.model.pack import Pack
from llamaweft.weights.linear import Linear

TILE_BYTES = 32 * 2**20
"""Size of one tile of fp32 logits."""


class CausalLMHead(Linear):
    """Next-token logits, and their cross-entropy on labelled positions only."""

    def loss(self, hidden_TE: Tensor, pack: Pack) -> tuple[Tensor, Tensor]:
        """sum_n weight_n * -log softmax(h_n W^T)[target_n], and sum_n weight_n, in fp32."""
        hidden_NE = hidden_TE[pack.label_position_N]
        total = _TiledCrossEntropy.apply(
            hidden_NE, self.weight, pack.label_target_N, pack.label_weight_N
        )
        return total, pack.label_weight_N.sum()

    @torch.no_grad()
    def label_losses(self, hidden_TE: Tensor, pack: Pack) -> Tensor:
        """-log softmax(h_n W^T)[target_n] of each label, without gradient: loss_N in fp32."""
        hidden_NE = hidden_TE[pack.label_position_N]
        w = self.weight.to(hidden_NE.dtype)
        tiles = _tiles(hidden_NE, w, pack.label_target_N)
        return torch.cat([loss_C for _, _, _, loss_C in tiles])


def _tiles(
    hidden_NE: Tensor, w_VE: Tensor, target_N: Tensor
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """(rows, logits_CV, log_normaliser_C1, loss_C) for one tile of labels after another."""
    tile = max(1, TILE_BYTES // (4 * len(w_VE)))
    for start in range(0, len(hidden_NE), tile):
        rows = slice(start, start + tile)
        logits_CV = (hidden_NE[rows] @ w_VE.t()).float()
        log_normaliser_C1 = logits_CV.logsumexp(dim=-1, keepdim=True)
        loss_C = (log_normaliser_C1 - logits_CV.gather(1, target_N[rows, None])).squeeze(1)
        yield rows, logits_CV, log_normaliser_C1, loss_C


class _TiledCrossEntropy(torch.autograd.Function):
    """Linear layer and cross-entropy in one, tile by tile over the labels.

    The gradient of a tile's logits is known as soon as its loss is: softmax - onehot. So the
    forward pass computes it at once and keeps grad_h (and, where W is trained, grad_W) instead
    of logits. The idea is that of Liger-Kernel's fused linear cross-entropy.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_NE: Tensor, w_VE: Tensor, target_N: Tensor, weight_N: Tensor
    ) -> Tensor:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        w = w_VE.to(hidden_NE.dtype)
        grad_NE = torch.empty_like(hidden_NE) if wants_hidden else None
        grad_VE = torch.zeros_like(w_VE) if wants_weight else None
        total = torch.zeros((), dtype=torch.float32, device=hidden_NE.device)
        for rows, logits_CV, log_normaliser_C1, loss_C in _tiles(hidden_NE, w, target_N):
            total += (loss_C * weight_N[rows]).sum()
            if grad_NE is None and grad_VE is None:
                continue
            grad_CV = logits_CV.sub_(log_normaliser_C1).exp_()
            grad_CV.scatter_add_(1, target_N[rows, None], -torch.ones_like(log_normaliser_C1))
            grad_CV = grad_CV.mul_(weight_N[rows, None]).to(w.dtype)
            if grad_NE is not None:
                grad_NE[rows] = grad_CV @ w
            if grad_VE is not None:
                grad_VE += grad_CV.t() @ hidden_NE[rows]
        ctx.save_for_backward(grad_NE, grad_VE)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        scale = grads[0]
        grad_NE, grad_VE = ctx.saved_tensors
        return (
            None if grad_NE is None else grad_NE * scale.to(grad_NE.dtype),
            None if grad_VE is None else grad_VE * scale,
            None,
            None,
        )
