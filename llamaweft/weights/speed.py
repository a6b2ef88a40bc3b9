"""How fast this device multiplies a model's frozen matrices, held as they will be.

O: outputs   I: inputs   T: tokens
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from llamaweft.weights.frozen import FrozenWeight, encode
from llamaweft.weights.matmul import product

ROWS = 2048
"""Rows (or columns) of a matrix that stand for all of it: several tiles, more than a cache."""

LEAST_SECONDS = 0.05
"""A product is repeated for at least so long, and its fastest run taken."""


def product_rates(
    shapes: Mapping[tuple[int, int], float], tokens: int, codec: str, dtype: torch.dtype
) -> tuple[float, float]:
    """FLOPs a second of products with frozen matrices on a CPU, decoded as they are multiplied,
    and of plain ones in `dtype`, taken in turn.

    shapes: (O, I) and how often it stands in a layer. Each counts forward (x w^T) and backward
    (g w), with `tokens` rows.
    """
    flops = decoded = plain = 0.0
    for (outputs, inputs), count in shapes.items():
        for o, i, forward in (
            (min(outputs, ROWS), inputs, True),
            (outputs, min(inputs, ROWS), False),
        ):
            w_OI = torch.randn(o, i)
            held = FrozenWeight(codec, (o, i), encode(codec, w_OI))
            w_OI = w_OI.to(dtype)
            x_T = torch.randn(tokens, i if forward else o).to(dtype)
            with_held = held.linear if forward else held.linear_backward
            with_held(x_T[:16])
            share = count * outputs * inputs / (o * i)
            flops += 2.0 * tokens * o * i * share
            decoded += share * _seconds(with_held, x_T)
            other = w_OI.t() if forward else w_OI
            plain += share * _seconds(partial(product, b_KN=other), x_T)
    return flops / decoded, flops / plain


def _seconds(product: Callable[[Tensor], Tensor], x_T: Tensor) -> float:
    taken: list[float] = []
    while sum(taken) < LEAST_SECONDS:
        began = time.perf_counter()
        product(x_T)
        taken.append(time.perf_counter() - began)
    return min(taken)
