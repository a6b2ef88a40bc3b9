"""Parts of a matrix in a codec hold the numbers of the whole one, whichever way it is cut."""

from __future__ import annotations

import pytest
import torch

from llamaweft.weights.codecs import CODECS, decode
from llamaweft.weights.frozen import FrozenWeight, encode

SHAPES = [(48, 768, 3), (8, 14336, 2), (64, 256, 4), (6, 448, 1), (512, 4096, 2)]
"""Rows, columns, parts: rows of 4, 12, 7, 64 and 224 blocks, so groups of scales cross rows or
not."""


def matrix(codec: str, rows: int, columns: int) -> FrozenWeight:
    generator = torch.Generator().manual_seed(rows + columns)
    scale = torch.rand(rows, 1, generator=generator) * torch.rand(1, columns, generator=generator)
    w_OI = torch.randn(rows, columns, generator=generator) * scale
    return FrozenWeight(codec, (rows, columns), encode(codec, w_OI))


def differ(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The norm of the difference over the norm: sums may run in another order."""
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize(("rows", "columns", "count"), SHAPES)
def test_a_part_is_a_slice(codec: str, dim: int, rows: int, columns: int, count: int) -> None:
    whole = matrix(codec, rows, columns)
    parts = [whole.cut(dim, part, count) for part in range(count)]
    for part, wanted in zip(parts, whole.dequantised().chunk(count, dim), strict=True):
        assert part.shape == wanted.shape
        assert torch.equal(part.dequantised(), wanted)  # by the kernels
        assert torch.equal(decode(codec, part.parts, torch.float32), wanted)  # by torch
        for tokens in (1, 5, 200):  # straight from the codes, and in both orders
            x_TI = torch.randn(tokens, wanted.shape[1])
            assert differ(part.linear(x_TI), x_TI @ wanted.t()) < 1e-5
        g_TO = torch.randn(5, len(wanted))
        assert differ(part.linear_backward(g_TO), g_TO @ wanted) < 1e-5


def test_a_part_can_be_cut_again() -> None:
    whole = matrix("nf4", 64, 512)
    part = whole.cut(1, 1, 2).cut(0, 1, 2).cut(1, 0, 2)
    assert torch.equal(part.dequantised(), whole.dequantised()[32:, 256:384])


@pytest.mark.parametrize(("codec", "dim", "count"), [("nf4", 1, 3), ("int8", 1, 8), ("bf16", 0, 3)])
def test_what_is_no_whole_number_of_blocks_is_refused(codec: str, dim: int, count: int) -> None:
    with pytest.raises(ValueError, match=f"{[64, 256][dim]} {['rows', 'columns'][dim]} in {count}"):
        matrix(codec, 64, 256).cut(dim, 0, count)
