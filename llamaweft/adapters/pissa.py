"""Adapters that start as the principal part of W: y = W x + s (B A - B0 A0) x.

Meng et al. (2024): PiSSA. A0, B0 are the largest singular values and vectors of W, A and B start
there and are trained. The paper and PEFT put W - s B0 A0 in the place of W and add s B A; frozen
weights are never written to here, so what they take from W is taken from the product instead.
Both are the same function.

T: tokens   I: input features   O: output features   R: rank   S: 2 R   K: min(I, O)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llamaweft.errors import UserError
from llamaweft.weights.codecs import PLAIN
from llamaweft.weights.frozen import FrozenWeight
from llamaweft.weights.matmul import add_thin_product, product, summed_over_tokens

NITER = "pissa_niter_"
"""What stands before the number of iterations."""


def iterations(init_lora_weights: str) -> int | None:
    """Of the randomised decomposition; None for the exact one."""
    count = init_lora_weights.removeprefix(NITER)
    return int(count) if count != init_lora_weights else None


def check_codec(init_lora_weights: str, codec: str, reason: str) -> None:
    """Raises UserError where frozen weights in `codec` have no principal part to start from."""
    if codec not in PLAIN:
        raise UserError(
            f"adapter.init_lora_weights: {init_lora_weights} needs frozen weights that are not "
            f"quantised, and they would be held in {codec} ({reason}); set base_weights: bf16, or "
            "init_lora_weights: default"
        )


def check_rank(rank: int, shapes: dict[str, tuple[int, int]]) -> None:
    """Raises UserError where one of these matrices, by name, has fewer singular values."""
    name, shape = min(shapes.items(), key=lambda item: min(item[1]))
    if rank > min(shape):
        raise UserError(
            f"adapter.r: {rank} is more than the {min(shape)} singular values of {name}, which "
            f"adapter.init_lora_weights would start from; set adapter.r: {min(shape)} or less"
        )


def principal(
    w_OI: Tensor, rank: int, init_lora_weights: str, scaling: float
) -> tuple[Tensor, Tensor]:
    """A0 [R, I] and B0 [O, R] in fp32: s B0 A0 is the best approximation of W of that rank.

    With W = U diag(S) V^T: A0 = diag(sqrt(S / s)) V^T, B0 = U diag(sqrt(S / s)), of the R largest.
    pissa_niter_N finds them by N subspace iterations from random numbers (Halko et al., 2011).
    Steps and order are those of PEFT's `LoraLayer.pissa_init`, so signs of vectors are PEFT's too.
    """
    niter = iterations(init_lora_weights)
    if niter is None:
        u_OK, s_K, v_KI = torch.linalg.svd(w_OI, full_matrices=False)
    else:
        u_OK, s_K, v_IK = torch.svd_lowrank(w_OI, rank, niter=niter)
        v_KI = v_IK.t()
    root_R = (s_K[:rank] / scaling).sqrt()
    return root_R[:, None] * v_KI[:rank], u_OK[:, :rank] * root_R


def principal_bytes(outputs: int, inputs: int, init_lora_weights: str) -> int:
    """What `principal` takes at its peak on a CPU: W in fp32; if exact, LAPACK's copy of it, U, V
    and the workspace of its divide and conquer (gesdd), 5 K^2."""
    matrix, least = outputs * inputs, min(outputs, inputs)
    if iterations(init_lora_weights) is not None:
        return 4 * matrix
    return 4 * (2 * matrix + (outputs + inputs) * least + 5 * least**2)


def difference(
    lora_a: Tensor, lora_b: Tensor, initial_a: Tensor, initial_b: Tensor
) -> tuple[Tensor, Tensor]:
    """[A; A - A0] [S, I] and [B - B0, B0] [O, S], whose product is B A - B0 A0.

    That of [A; A0] and [B, -B0] is the same, but large numbers cancel in it, which leaves their
    rounding in bf16. Here nothing does, and the start is the base bit for bit.
    """
    a_SI = torch.cat([lora_a.detach(), lora_a.detach() - initial_a])
    b_OS = torch.cat([lora_b.detach() - initial_b, initial_b], dim=1)
    return a_SI, b_OS


class PissaProduct(torch.autograd.Function):
    """y = x W^T + s (x a^T) b^T with a = [A; A - A0] and b = [B - B0, B0].

    With low = s x a^T:  dlow = s g b,  dx = g W + dlow a,  dB = g^T low[:, :R]; and since
    g B = g (B - B0) + g B0, dA = (dlow[:, :R] + dlow[:, R:])^T x. A0 and B0 get no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TI: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        initial_a: Tensor,
        initial_b: Tensor,
        weight: FrozenWeight,
        scaling: float,
        given: tuple[Tensor | None],
    ) -> Tensor:
        ctx.weight, ctx.scaling = weight, scaling
        a_SI, b_OS = _as(x_TI.dtype, lora_a, lora_b, initial_a, initial_b)
        low_TS = product(x_TI, a_SI.t()).mul_(scaling)
        ctx.save_for_backward(x_TI, lora_a, lora_b, initial_a, initial_b, low_TS)
        if given[0] is not None:
            return given[0]
        return add_thin_product(weight.linear(x_TI), low_TS, b_OS.t())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, lora_a, lora_b, initial_a, initial_b, low_TS = ctx.saved_tensors
        g_TO, rank = grads[0], len(lora_a)
        a_SI, b_OS = _as(g_TO.dtype, lora_a, lora_b, initial_a, initial_b)
        g_low_TS = product(g_TO, b_OS).mul_(ctx.scaling)
        g_b = summed_over_tokens(g_TO, low_TS[:, :rank]).to(lora_b.dtype)
        g_low_TR = g_low_TS[:, :rank] + g_low_TS[:, rank:]
        g_a = summed_over_tokens(g_low_TR, x_TI).to(lora_a.dtype)
        g_x = None
        if ctx.needs_input_grad[0]:
            g_x = add_thin_product(ctx.weight.linear_backward(g_TO), g_low_TS, a_SI)
        return g_x, g_a, g_b, None, None, None, None, None


def _as(dtype: torch.dtype, *halves: Tensor) -> tuple[Tensor, Tensor]:
    a_SI, b_OS = difference(*halves)
    return a_SI.to(dtype), b_OS.to(dtype)
