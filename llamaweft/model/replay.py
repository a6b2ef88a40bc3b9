"""Running a segment of a layer again for its backward pass, instead of keeping all of it.

A layer is two segments, attention and MLP. In the forward pass a segment runs without autograd and
keeps its input and the outputs that the Schedule names. In the backward pass it runs again with
autograd; a product whose output was kept hands that on (weights/linear.py), so that only what was
not kept is computed twice. The last product of a segment is not: nothing needs its output again,
unless its own gradient does (DoRA), and then it may be kept too.
Kept or computed again, the numbers are the same bits.

The idea is that of selective activation recomputation (Korthikanti et al., 2022).

T: tokens   E: hidden size
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

KEEPABLE = ("q_proj", "k_proj", "v_proj", "attention", "mid", "gate_proj", "up_proj")
"""Outputs that a Schedule may keep, and with DoRA `o_proj` and `down_proj` too. `mid` is the hidden
state between the two segments."""


class Tape:
    """What one run of a segment keeps, or is given back.

    keep: names of KEEPABLE. final: the product whose output a second run does not need.
    dtype: what kept outputs are held in; None: as they are.
    """

    def __init__(
        self, keep: frozenset[str] = frozenset(), final: str = "", dtype: torch.dtype | None = None
    ) -> None:
        self.keep, self.final, self.dtype = keep, final, dtype
        self.kept: dict[str, Any] = {}
        self.again = False

    def product(self, name: str, layer: Any, x_TI: Tensor) -> Tensor:
        """layer(x), kept or given back."""
        if self.again:
            if name == self.final and not layer.gradient_needs_output:
                # One number, seen as many: only the gradient of this output is used.
                nothing = x_TI.new_zeros(1).expand(len(x_TI), layer.out_features)
                return layer(x_TI, given=nothing)
            held = self.kept.pop(name, None)
            return layer(x_TI, given=None if held is None else held.to(x_TI.dtype))
        y_TO = layer(x_TI)
        if name in self.keep:
            self.kept[name] = y_TO.to(self.dtype or y_TO.dtype)
        return y_TO

    def attention(
        self, attend: Any, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor
    ) -> Tensor:
        """attend(...), kept with the normalisers that its backward pass needs."""
        if self.again:
            return attend(layer, q_THD, k_TKD, v_TKD, given=self.kept.pop("attention", None))
        if "attention" not in self.keep or q_THD.is_cuda:  # a GPU's attention gives none
            return attend(layer, q_THD, k_TKD, v_TKD)
        o_THD, normalisers = attend.normalised(q_THD, k_TKD, v_TKD)
        self.kept["attention"] = (o_THD, normalisers)
        return o_THD


Run = Callable[[Tensor, Tape], Tensor]


@dataclass
class Tiling:
    """goes_on: whether the backward pass is at a tile that others of its segment follow, which will
    add to the gradients of the same parameters."""

    goes_on: bool = False


class Segment:
    """One segment of one layer in one pass.

    run: the computation, for one tile of the input's rows. tile: rows computed at once; None: all.
    source: the segment whose output is this one's input, where that input is not kept.
    random: whether the run draws random numbers, which the second run must draw again.
    tiling: told which tile the backward pass is at.
    """

    def __init__(
        self,
        run: Run,
        keep: frozenset[str],
        final: str,
        *,
        tile: int | None = None,
        source: Segment | None = None,
        dtype: torch.dtype | None = None,
        random: bool = False,
        tiling: Tiling | None = None,
    ) -> None:
        self.run, self.tile, self.source, self.random = run, tile, source, random
        self.tiling = tiling or Tiling()
        self.keep, self.final, self.dtype = keep, final, dtype
        self.tapes: list[Tape] = []
        self.input: Tensor | None = None
        self.replayed: tuple[Tensor, Tensor] | None = None

    def forward(self, x_TE: Tensor) -> Tensor:
        """The first run. Nothing but what is kept stays."""
        if self.source is None:
            self.input = x_TE
        if self.random:
            self.seed = torch.get_rng_state(), _cuda_state(x_TE)
        outputs = []
        for rows_TE in self._tiles(x_TE):
            self.tapes.append(Tape(self.keep, self.final, self.dtype))
            outputs.append(self.run(rows_TE, self.tapes[-1]))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def output(self) -> Tensor:
        """The output once more, by a second run of which the backward pass makes use."""
        assert len(self.tapes) == 1
        self.tapes[0].final = ""
        x_TE = self._input()
        with self._same_random_numbers(x_TE):
            self.replayed = self._replay(x_TE, 0, wants_input=True)
        return self.replayed[1].detach()

    def backward(self, g_TE: Tensor, wants_input: bool) -> Tensor | None:
        """The gradient of the input; those of parameters are added to their `grad`."""
        if self.replayed is not None:
            leaf, y_TE = self.replayed
            self.replayed = None
            torch.autograd.backward(y_TE, g_TE)
            return leaf.grad if wants_input else None
        x_TE = self._input()
        self.input = None
        tiles = self._tiles(x_TE)
        grads: list[Tensor | None] = []
        with self._same_random_numbers(x_TE):
            for index, g_rows in enumerate(self._tiles(g_TE, len(tiles))):
                leaf, y_TE = self._replay(tiles[index], index, wants_input)
                self.tiling.goes_on = index < len(tiles) - 1
                torch.autograd.backward(y_TE, g_rows)
                grads.append(leaf.grad)
                del leaf, y_TE
        if not wants_input:
            return None
        return grads[0] if len(grads) == 1 else torch.cat(grads)  # type: ignore[arg-type]

    def _input(self) -> Tensor:
        if self.input is None:
            assert self.source is not None
            return self.source.output()
        return self.input

    def _tiles(self, x_TE: Tensor, count: int | None = None) -> list[Tensor]:
        """The rows in tiles; `count` of them where the output has other rows than the input."""
        if count == 1 or self.tile is None or len(x_TE) <= self.tile:
            return [x_TE]
        return list(x_TE.split(self.tile))

    def _replay(self, x_TE: Tensor, index: int, wants_input: bool) -> tuple[Tensor, Tensor]:
        leaf = x_TE.detach().requires_grad_(wants_input)
        self.tapes[index].again = True
        with torch.enable_grad():
            return leaf, self.run(leaf, self.tapes[index])

    def _same_random_numbers(self, x_TE: Tensor) -> Any:
        if not self.random:
            return nullcontext()
        return _Replayed(self.seed, x_TE)


class _Replayed:
    """The random generators as they were, for a while."""

    def __init__(self, seed: tuple[Tensor, Tensor | None], x: Tensor) -> None:
        self.seed, self.x = seed, x

    def __enter__(self) -> None:
        self.now = torch.get_rng_state(), _cuda_state(self.x)
        _set_state(self.seed, self.x)

    def __exit__(self, *_: object) -> None:
        _set_state(self.now, self.x)


def _cuda_state(x: Tensor) -> Tensor | None:
    return torch.cuda.get_rng_state(x.device) if x.is_cuda else None


def _set_state(state: tuple[Tensor, Tensor | None], x: Tensor) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], x.device)


def recorded(segment: Segment, x_TE: Tensor, before: Callable[[], None]) -> Tensor:
    """The output of a segment, as one node of the autograd graph.

    before: called when the backward pass comes to the segment.
    """
    anchor = x_TE.new_empty(0).requires_grad_()  # the output needs a gradient in any case
    return _Recorded.apply(x_TE, anchor, segment, before)


class _Recorded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TE: Tensor, anchor: Tensor, segment: Segment, before: Callable[[], None]
    ) -> Tensor:
        ctx.segment, ctx.before = segment, before
        return segment.forward(x_TE)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None]:
        ctx.before()
        return ctx.segment.backward(grads[0], ctx.needs_input_grad[0]), None, None, None
