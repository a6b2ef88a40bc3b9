"""What the machine multiplies right now: fp32 products of a model's own shapes.

The yardstick for a step's useful FLOPs. It is taken between the steps, since a shared machine
drifts; each shape counts by the FLOPs that a step spends on it. There are two: what torch.mm
multiplies, and what the faster of torch's libraries does (llamaweft.weights.matmul).

T: tokens of a pack   I: input features   O: output features
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llamaweft.weights.matmul import product

HEAD_ROWS = 16384
"""Rows of the head that stand for all of it; they outgrow every cache as well."""

LEAST_SECONDS = 0.15
"""A product is repeated for at least so long, and its median taken."""


Multiply = Callable[..., Any]
"""(a, b, out=) -> a b."""


class Rates(NamedTuple):
    """FLOPs a second of torch.mm, and of the faster of torch's libraries."""

    sgemm: float
    fastest: float


@dataclass(frozen=True)
class Shape:
    """One [T, I] x [O, I]^T product; weights: elements that a step multiplies in such products,
    for each computed token."""

    outputs: int
    inputs: int
    weights: float


def model_shapes(folder: Path, labelled_share: float) -> list[Shape]:
    """The base products of a model folder. The head counts on labelled positions only."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    queries, keys = heads * head_dim, config["num_key_value_heads"] * head_dim
    layers = config["num_hidden_layers"]
    shapes = [
        Shape(queries, hidden, layers * queries * hidden),
        Shape(hidden, queries, layers * queries * hidden),
        Shape(keys, hidden, 2 * layers * keys * hidden),
        Shape(inner, hidden, 2 * layers * inner * hidden),
        Shape(hidden, inner, layers * inner * hidden),
    ]
    vocabulary = config["vocab_size"]
    head = Shape(min(vocabulary, HEAD_ROWS), hidden, labelled_share * vocabulary * hidden)
    return [*shapes, head]


class Sgemm:
    """Matrices of a model's shapes, whole in fp32, and the rate at which torch multiplies them."""

    def __init__(self, shapes: list[Shape], pack_tokens: int) -> None:
        self.shapes, self.pack_tokens = shapes, pack_tokens
        self._weights = [torch.randn(shape.outputs, shape.inputs) for shape in shapes]
        width = max(max(shape.outputs, shape.inputs) for shape in shapes)
        self._x, self._y = torch.randn(pack_tokens * width), torch.empty(pack_tokens * width)

    def measure(self, multiply: Multiply = torch.mm) -> float:
        """FLOPs a second of forward (x w^T) and backward (g w) products, shapes by their share."""
        flops = seconds = 0.0
        for shape, w_OI in zip(self.shapes, self._weights, strict=True):
            x_TI = self._x[: self.pack_tokens * shape.inputs].view(-1, shape.inputs)
            g_TO = self._x[: self.pack_tokens * shape.outputs].view(-1, shape.outputs)
            once = self._median_seconds(multiply, x_TI, w_OI.t())
            once += self._median_seconds(multiply, g_TO, w_OI)
            times = shape.weights / w_OI.numel()
            flops += 4.0 * self.pack_tokens * shape.weights
            seconds += once * times
        return flops / seconds

    def measure_both(self) -> Rates:
        return Rates(self.measure(), self.measure(product))

    def _median_seconds(self, multiply: Multiply, a: Tensor, b: Tensor) -> float:
        out = self._y[: len(a) * b.shape[1]].view(len(a), -1)
        taken: list[float] = []
        while sum(taken) < LEAST_SECONDS:
            began = time.perf_counter()
            multiply(a, b, out=out)
            taken.append(time.perf_counter() - began)
        return statistics.median(taken)
