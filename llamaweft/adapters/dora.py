"""Weight-decomposed adapters: y = m / n * (W x + s B A x), n the norms of the rows of W + s B A.

Liu et al. (2024): DoRA. A, B and the magnitudes m are trained; n follows A and B and is taken as
a constant in the backward pass, as in the paper (section 4.3) and in PEFT.

T: tokens   I: input features   O: output features   R: rank
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llamaweft.weights.frozen import FrozenWeight
from llamaweft.weights.matmul import add_thin_product, product, summed_over_tokens


def row_norms(
    base_squares_O: Tensor, weight: FrozenWeight, lora_a: Tensor, lora_b: Tensor, scaling: float
) -> Tensor:
    """n_O = ||w_o + s b_o A|| in fp32, from one product of the width of A.

    n_o^2 = ||w_o||^2 + 2 s b_o . (A w_o) + s^2 b_o (A A^T) b_o^T, so no row of the sum is ever
    made. base_squares_O: ||w_o||^2, which stay as they are.
    """
    a_RI, b_OR = lora_a.detach().float(), lora_b.detach().double()
    cross_OR = weight.linear(a_RI).t()  # the rows of A go through W as tokens do
    gram_RR = (a_RI @ a_RI.t()).double()
    squares_O = base_squares_O + 2 * scaling * (b_OR * cross_OR).sum(1)
    squares_O += scaling**2 * ((b_OR @ gram_RR) * b_OR).sum(1)
    return squares_O.clamp_(min=0).sqrt_().float()


def factors(magnitude_O: Tensor, norm_O: Tensor) -> Tensor:
    """m / n in fp32; 0 for a row that is nothing but zeros."""
    return torch.where(norm_O > 0, magnitude_O.detach() / norm_O, 0.0)


class DoraProduct(torch.autograd.Function):
    """y = f (x W^T + s (x A^T) B^T) with f = m / n, n constant.

    With gf = f g and low = s x A^T:  dB = gf^T low,  dlow = s gf B,  dA = dlow^T x,
    dx = gf W + dlow A, and dm = sum over T of g (y / f) / n = sum over T of g y / m. So the output
    is needed again, and the product without f never is; a magnitude of exactly 0 gets no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TI: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        magnitude_O: Tensor,
        weight: FrozenWeight,
        scaling: float,
        norm_O: Tensor,
        given: tuple[Tensor | None],
    ) -> Tensor:
        ctx.weight, ctx.scaling = weight, scaling
        a_RI, b_OR = lora_a.to(x_TI.dtype), lora_b.to(x_TI.dtype)
        low_TR = product(x_TI, a_RI.t()).mul_(scaling)
        y_TO = given[0]
        if y_TO is None:
            y_TO = add_thin_product(weight.linear(x_TI), low_TR, b_OR.t())
            y_TO.mul_(factors(magnitude_O, norm_O))
        ctx.save_for_backward(x_TI, lora_a, lora_b, magnitude_O, norm_O, low_TR, y_TO)
        return y_TO

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, lora_a, lora_b, magnitude_O, norm_O, low_TR, y_TO = ctx.saved_tensors
        g_TO = grads[0]
        a_RI, b_OR = lora_a.to(g_TO.dtype), lora_b.to(g_TO.dtype)
        product_TO = g_TO * y_TO
        summed_O = product_TO.sum(0, dtype=torch.float32)
        g_m = torch.where(magnitude_O != 0, summed_O / magnitude_O, 0.0)
        gf_TO = torch.mul(g_TO, factors(magnitude_O, norm_O), out=product_TO)
        g_low_TR = product(gf_TO, b_OR).mul_(ctx.scaling)
        g_b = summed_over_tokens(gf_TO, low_TR).to(lora_b.dtype)
        g_a = summed_over_tokens(g_low_TR, x_TI).to(lora_a.dtype)
        g_x = None
        if ctx.needs_input_grad[0]:
            g_x = add_thin_product(ctx.weight.linear_backward(gf_TO), g_low_TR, a_RI)
        return g_x, g_a, g_b, g_m, None, None, None, None
