"""SwiGLU's elementwise part, silu(gate) * up, with a backward pass that stays in the cache.

T: tokens   F: intermediate size
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_BYTES = 2**20
"""Bytes of each operand that are worked on at once on a CPU."""


def swiglu(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer, 2020); its gradient overwrites the incoming one."""
    return _SwiGLU.apply(gate_TF, up_TF)


def _chunks(x_TF: Tensor) -> Iterator[slice]:
    row_bytes = x_TF.shape[1] * x_TF.element_size()
    rows = len(x_TF) if x_TF.is_cuda else max(1, CHUNK_BYTES // row_bytes)
    for start in range(0, len(x_TF), max(rows, 1)):
        yield slice(start, start + rows)


class _SwiGLU(torch.autograd.Function):
    """With s = sigmoid(gate):  d_up = g gate s,  d_gate = g up s (1 + gate (1 - s)).

    Only gate and up are held. The incoming gradient becomes d_gate in place: it comes from the
    down projection, which makes it for this function alone.
    """

    @staticmethod
    def forward(ctx: Any, gate_TF: Tensor, up_TF: Tensor) -> Tensor:
        ctx.save_for_backward(gate_TF, up_TF)
        product_TF = torch.empty_like(up_TF)
        for rows in _chunks(gate_TF):
            torch.mul(F.silu(gate_TF[rows]), up_TF[rows], out=product_TF[rows])
        return product_TF

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate_TF, up_TF = ctx.saved_tensors
        g_TF = grads[0]
        g_up_TF = torch.empty_like(up_TF)
        for rows in _chunks(gate_TF):
            gate, g = gate_TF[rows], g_TF[rows]
            torch.mul(F.silu(gate), g, out=g_up_TF[rows])
            g.mul_(up_TF[rows])
            torch.ops.aten.silu_backward.grad_input(g, gate, grad_input=g)
        return g_TF, g_up_TF
