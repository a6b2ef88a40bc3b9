"""Products of fp32 matrices on a CPU, by the faster of the two libraries that torch brings.

torch multiplies fp32 with MKL, which takes its AVX-512 code on Intel's CPUs alone. oneDNN, which
torch has for bf16 and convolutions, goes by what the CPU can do: on an AMD CPU with full AVX-512 it
is twice as fast (docs/log.md). There it multiplies here, through the operator that torch's own
compiler calls; elsewhere, and for every other dtype and device, torch.mm does.

oneDNN compiles a kernel for each shape, and keeps it. Packs have many lengths, so rows go in blocks
of few sizes: the last begins a little earlier and computes some rows once more, or zeros follow.

M, N: rows and columns of a product   K: what is summed over   T: tokens
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from llamaweft.runtime import mkl_is_held_back

BLOCK, GRAIN = 256, 16
"""Rows that are multiplied at once, and what a smaller number of them is a multiple of."""


BY_ONEDNN = mkl_is_held_back()
"""Decided by the machine, never by a measurement: the same machine gives the same bits."""


def takes_onednn(a: Tensor) -> bool:
    """Whether products with this matrix are oneDNN's."""
    return BY_ONEDNN and a.dtype == torch.float32 and a.device.type == "cpu"


def padded(a_MK: Tensor) -> Tensor:
    """The matrix, with rows of zeros where it is less than a block and no multiple of GRAIN: one
    product is then faster than two blocks. For products with many matrices, whose `out` has the
    rows that count."""
    missing = -len(a_MK) % GRAIN
    if not takes_onednn(a_MK) or len(a_MK) < GRAIN or len(a_MK) > BLOCK or not missing:
        return a_MK
    return torch.cat([a_MK, a_MK.new_zeros(missing, a_MK.shape[1])])


def product(a_MK: Tensor, b_KN: Tensor, out: Tensor | None = None) -> Tensor:
    """a b, in `out` where one is given, without the rows that `padded` added to a. Without
    gradients: autograd does not see it."""
    if not takes_onednn(a_MK) or len(a_MK) < GRAIN:
        return torch.mm(a_MK, b_KN, out=out)
    if out is None:
        out = a_MK.new_empty(len(a_MK), b_KN.shape[1])
    for rows in row_blocks(len(a_MK)):
        out[rows] = _onednn(a_MK[rows], b_KN)[: len(out) - rows.start]
    return out


def product_in_columns(a_MK: Tensor, b_KN: Tensor, out: Tensor) -> Tensor:
    """`product` where it is b's columns whose number varies, and that may be padded."""
    if not takes_onednn(a_MK) or b_KN.shape[1] < GRAIN:
        return torch.mm(a_MK, b_KN, out=out)
    for columns in row_blocks(b_KN.shape[1]):
        out[:, columns] = _onednn(a_MK, b_KN[:, columns])[:, : out.shape[1] - columns.start]
    return out


def add_product(sum_MN: Tensor, a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """sum += a b, in place."""
    if not takes_onednn(a_MK) or len(a_MK) < GRAIN:
        return sum_MN.addmm_(a_MK, b_KN)
    a_MK, done = padded(a_MK), 0
    for rows in row_blocks(len(a_MK)):
        stop = min(rows.stop, len(sum_MN))
        sum_MN[done:stop] += _onednn(a_MK[rows], b_KN)[done - rows.start : stop - rows.start]
        done = stop
    return sum_MN


def summed_over_tokens(a_TM: Tensor, b_TN: Tensor) -> Tensor:
    """a^T b, the gradient of a matrix whose products have a and b on their two sides."""
    tokens = len(a_TM) // GRAIN * GRAIN
    if not takes_onednn(a_TM) or not tokens:
        return torch.mm(a_TM.t(), b_TN)
    if a_TM.shape[1] > b_TN.shape[1]:  # the narrower one first is several times as fast
        return summed_over_tokens(b_TN, a_TM).t()
    # A sum as large as a matrix is made once.
    step = min(BLOCK, tokens) if a_TM.shape[1] <= BLOCK else tokens
    sum_MN = _onednn(a_TM[:step].t(), b_TN[:step])
    for start in range(step, tokens, step):
        rows = slice(start, min(start + step, tokens))
        sum_MN.add_(_onednn(a_TM[rows].t(), b_TN[rows]))
    return sum_MN if tokens == len(a_TM) else sum_MN.addmm_(a_TM[tokens:].t(), b_TN[tokens:])


def row_blocks(count: int) -> Iterator[slice]:
    """Slices that cover range(count), of BLOCK rows (or columns) or a smaller multiple of GRAIN;
    the last may begin inside the one before it. count is at least GRAIN."""
    whole = count // BLOCK * BLOCK
    yield from (slice(start, start + BLOCK) for start in range(0, whole, BLOCK))
    rest = count - whole
    if not rest:
        return
    size = -(-rest // GRAIN) * GRAIN
    if size > count:  # a single block that is not full
        size = GRAIN
        yield slice(0, rest // GRAIN * GRAIN)
    yield slice(count - size, count)


def _onednn(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(a_MK, b_KN.t(), None, "none", [], "")
