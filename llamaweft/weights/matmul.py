"""Products of matrices on a CPU, by the faster of the two libraries that torch brings.

torch multiplies fp32 with MKL, which takes its AVX-512 code on Intel's CPUs alone. oneDNN, which
torch takes for bf16, goes by what the CPU can do: on an AMD CPU with full AVX-512 it is twice as
fast in fp32 (docs/log.md). There it multiplies here, through the operator that torch's own
compiler calls; elsewhere, and for every other dtype and device, torch.mm does.

oneDNN compiles a kernel for each shape, and keeps it. Packs have many lengths, so rows go in blocks
of few sizes: the last begins a little earlier and computes some rows once more, or zeros follow.

M, N: rows and columns of a product   K: what is summed over   T: tokens
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from llamaweft.runtime import mkl_is_held_back


class Sizes(NamedTuple):
    """block: rows that oneDNN multiplies at once. grain: a smaller number of them is a multiple."""

    block: int
    grain: int


FP32, BF16 = Sizes(256, 16), Sizes(512, 32)

KERNEL_BYTES, KERNEL_SHAPES = 700 * 2**10, 20
"""Of a kernel of oneDNN's for bf16, as measured (docs/log.md), and how many a step of one number of
rows needs: the products of a layer's matrices, their adapters and the head, there and back."""

BY_ONEDNN = mkl_is_held_back()
"""Whether oneDNN multiplies fp32. Decided by the machine, never by a measurement: the same machine
gives the same bits."""


def sizes_for(a: Tensor) -> Sizes | None:
    """The sizes in which this matrix's rows are multiplied; None where any number will do."""
    if a.device.type != "cpu":
        return None
    if a.dtype == torch.bfloat16:
        return BF16
    return FP32 if BY_ONEDNN and a.dtype == torch.float32 else None


def kernel_bytes(dtype: torch.dtype, rows: int) -> int:
    """What oneDNN's kernels may come to take of a CPU's memory in steps of up to so many rows;
    those for fp32 are few and small."""
    if dtype != torch.bfloat16:
        return 0
    sizes = -(-min(rows, BF16.block) // BF16.grain)
    return KERNEL_BYTES * KERNEL_SHAPES * sizes


def padded(a_MK: Tensor) -> Tensor:
    """The matrix, with rows of zeros where it is less than a block and no multiple of the grain:
    one product is then faster than two blocks. For products with many matrices, whose `out` has the
    rows that count."""
    sizes = sizes_for(a_MK)
    if sizes is None or not sizes.grain <= len(a_MK) <= sizes.block:
        return a_MK
    return _filled(a_MK, sizes.grain)


def product(a_MK: Tensor, b_KN: Tensor, out: Tensor | None = None) -> Tensor:
    """a b, in `out` where one is given, without the rows that `padded` added to a. Without
    gradients: autograd does not see it."""
    sizes = sizes_for(a_MK)
    if sizes is None or len(a_MK) < sizes.grain:
        return torch.mm(a_MK, b_KN, out=out)
    if out is None:
        out = a_MK.new_empty(len(a_MK), b_KN.shape[1])
    for rows in row_blocks(len(a_MK), sizes):
        out[rows] = _onednn(a_MK[rows], b_KN)[: len(out) - rows.start]
    return out


def product_in_columns(a_MK: Tensor, b_KN: Tensor, out: Tensor) -> Tensor:
    """`product` where it is b's columns whose number varies, and that may be padded; `out` may be
    of another dtype."""
    sizes = sizes_for(a_MK)
    if sizes is None or b_KN.shape[1] < sizes.grain:
        if out.dtype != a_MK.dtype:
            return out.copy_(a_MK @ b_KN)
        return torch.mm(a_MK, b_KN, out=out)
    for columns in row_blocks(b_KN.shape[1], sizes):
        out[:, columns] = _onednn(a_MK, b_KN[:, columns])[:, : out.shape[1] - columns.start]
    return out


def add_product(sum_MN: Tensor, a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """sum += a b, in place; the sum may be of another dtype."""
    sizes = sizes_for(a_MK)
    if sizes is None or len(a_MK) < sizes.grain:
        if sum_MN.dtype != a_MK.dtype:
            return sum_MN.add_(a_MK @ b_KN)
        return sum_MN.addmm_(a_MK, b_KN)
    a_MK, done = padded(a_MK), 0
    for rows in row_blocks(len(a_MK), sizes):
        stop = min(rows.stop, len(sum_MN))
        sum_MN[done:stop] += _onednn(a_MK[rows], b_KN)[done - rows.start : stop - rows.start]
        done = stop
    return sum_MN


def add_thin_product(sum_MN: Tensor, a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """sum += a b, in place and rounded once, where K is so small that writing the sum is what takes
    the time."""
    if sum_MN.dtype != torch.bfloat16 or sizes_for(a_MK) is None:
        return sum_MN.addmm_(a_MK, b_KN)  # MKL's, which keeps no kernels
    block, grain = BF16
    whole = len(a_MK) // grain * grain
    for start in range(0, whole, block):
        rows = slice(start, min(start + block, whole))
        sum_MN[rows].addmm_(a_MK[rows], b_KN)
    if whole < len(a_MK):
        last = _filled(sum_MN[whole:], grain).addmm_(_filled(a_MK[whole:], grain), b_KN)
        sum_MN[whole:] = last[: len(a_MK) - whole]
    return sum_MN


def summed_over_tokens(a_TM: Tensor, b_TN: Tensor) -> Tensor:
    """a^T b, the gradient of a matrix whose products have a and b on their two sides; in fp32 where
    it is a sum of several products."""
    sizes = sizes_for(a_TM)
    tokens = 0 if sizes is None else len(a_TM) // sizes.grain * sizes.grain
    if sizes is None or not tokens:
        return torch.mm(a_TM.t(), b_TN)
    if a_TM.shape[1] > b_TN.shape[1]:  # the narrower one first is several times as fast
        return summed_over_tokens(b_TN, a_TM).t()
    # A sum as large as a matrix is made once.
    step = min(sizes.block, tokens) if a_TM.shape[1] <= sizes.block else tokens
    sum_MN = _onednn(a_TM[:step].t(), b_TN[:step]).float()
    for start in range(step, tokens, step):
        rows = slice(start, min(start + step, tokens))
        sum_MN.add_(_onednn(a_TM[rows].t(), b_TN[rows]))
    if tokens < len(a_TM):
        sum_MN.addmm_(a_TM[tokens:].t().float(), b_TN[tokens:].float())
    return sum_MN


def row_blocks(count: int, sizes: Sizes) -> Iterator[slice]:
    """Slices that cover range(count), each of a block or a smaller multiple of the grain; the last
    may begin inside the one before it. count is at least the grain."""
    block, grain = sizes
    whole = count // block * block
    yield from (slice(start, start + block) for start in range(0, whole, block))
    rest = count - whole
    if not rest:
        return
    size = -(-rest // grain) * grain
    if size > count:  # a single block that is not full
        size = grain
        yield slice(0, rest // grain * grain)
    yield slice(count - size, count)


def _filled(a_MK: Tensor, grain: int) -> Tensor:
    """The matrix, with rows of zeros up to a multiple of the grain."""
    missing = -len(a_MK) % grain
    return torch.cat([a_MK, a_MK.new_zeros(missing, a_MK.shape[1])]) if missing else a_MK


def _onednn(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    if a_MK.dtype == torch.bfloat16:
        return torch.mm(a_MK, b_KN)  # is oneDNN's
    return torch.ops.mkldnn._linear_pointwise(a_MK, b_KN.t(), None, "none", [], "")
