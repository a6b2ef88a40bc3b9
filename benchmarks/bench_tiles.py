"""The pieces of the engine on a CPU, each against its alternative, taken in turn.

    python -m benchmarks.bench_tiles [--tokens 1024]

products: a frozen matrix in tiles (decoded or plain) against one fp32 product of the whole.
decoding: numba's kernels, in a buffer that stays in the cache and over the whole matrix.
attention: the backward pass in blocks of matrix products against torch's own kernel.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from llamaweft.model import flash
from llamaweft.weights.frozen import FrozenWeight, encode

ROUNDS = 7
INPUTS, OUTPUTS = 4096, 14336
"""A gate projection of Llama 3 8B."""


def taken_in_turn(functions: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of each function, one after another in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(ROUNDS):
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(found) for name, found in seconds.items()}


def products(tokens: int) -> None:
    w = torch.randn(OUTPUTS, INPUTS)
    x, g = torch.randn(tokens, INPUTS), torch.randn(tokens, OUTPUTS)
    y, back = torch.empty(tokens, OUTPUTS), torch.empty(tokens, INPUTS)
    held = {codec: FrozenWeight(codec, (OUTPUTS, INPUTS), encode(codec, w)) for codec in CODECS}
    flops = 2 * tokens * INPUTS * OUTPUTS
    forward: dict[str, Callable[[], object]] = {"whole": lambda: torch.mm(x, w.t(), out=y)}
    backward: dict[str, Callable[[], object]] = {"whole": lambda: torch.mm(g, w, out=back)}
    for codec, weight in held.items():
        forward[codec] = lambda weight=weight: weight.linear(x)  # type: ignore[misc]
        backward[codec] = lambda weight=weight: weight.linear_backward(g)  # type: ignore[misc]
    for title, functions in (("forward", forward), ("backward", backward)):
        rates = {name: flops / t / 1e9 for name, t in taken_in_turn(functions).items()}
        found = "  ".join(f"{name} {rate:.0f}" for name, rate in rates.items())
        print(f"products, {tokens} tokens, {title}: {found} GFLOP/s")


CODECS = ("nf4", "int8", "fp32")


def decoding() -> None:
    w = torch.randn(OUTPUTS, INPUTS)
    for codec in ("nf4", "int8"):
        weight = FrozenWeight(codec, (OUTPUTS, INPUTS), encode(codec, w))

        def tiles(weight: FrozenWeight = weight) -> None:
            for start in range(0, OUTPUTS, 512):
                weight.rows(start, start + 512, torch.float32)

        functions = {"in tiles": tiles, "whole": weight.dequantised}
        rates = {n: OUTPUTS * INPUTS / t / 1e9 for n, t in taken_in_turn(functions).items()}
        print(f"decoding {codec}: " + "  ".join(f"{n} {r:.1f}" for n, r in rates.items()) + " G/s")


def attention(length: int) -> None:
    q, g = torch.randn(length, 32, 128), torch.randn(length, 32, 128)
    k, v = torch.randn(length, 8, 128), torch.randn(length, 8, 128)
    pieces = [flash.Piece(slice(0, length), [], slice(0, length))]
    o, normalisers = flash.flash_forward(q, k, v, pieces)
    heads = [flash._by_head(x, 8) for x in (g, q, o)]
    keys = [x.transpose(0, 1) for x in (k, v)]
    room = [torch.zeros_like(flash._by_head(q, 8)), *(torch.zeros_like(x) for x in keys)]

    def ran(function: Callable[..., None]) -> Callable[[], None]:
        return lambda: function(heads[0], heads[1], *keys, heads[2], normalisers[0], True, *room)

    functions = {"blocks": ran(flash._blocked), "torch's kernel": ran(flash._flash_range)}
    times = taken_in_turn(functions)
    found = "  ".join(f"{name} {1000 * t:.1f}" for name, t in times.items())
    print(f"attention backward, {length} tokens: {found} ms")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_tiles")
    parser.add_argument("--tokens", type=int, action="append", help="default: 256 and 1024")
    for tokens in parser.parse_args().tokens or (256, 1024):
        products(tokens)
    decoding()
    for length in (32, 100, 300, 1000):
        attention(length)


if __name__ == "__main__":
    main()
