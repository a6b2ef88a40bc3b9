"""One token's product straight from the codes: y_O = w_OI x_I, with no decoded copy of w.

Generating one sequence reads every weight once for each token, so what counts is how few bytes are
read and how few instructions turn them into products. Each block of 64 numbers is multiplied
in registers: eight at a time, summed in fp32, and scaled once.

nf4 looks its levels up by AVX2's permutation, as kernels.py does, but puts no codes in order: the
high halves of eight bytes meet the even numbers of x, the low halves the odd ones; x is put into
that order once.

O: rows   I: columns
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from llamaweft.weights.codecs import NF4_LEVELS
from llamaweft.weights.kernels import HAS_AVX2, PAIRS, Arrays, nf4_parts

ROWS = 32
"""Rows that a thread takes at once."""

AHEAD_BYTES = 1024
"""How far ahead of the codes that are multiplied others are asked for."""

_F32, _I8, _I32 = ir.FloatType(), ir.IntType(8), ir.IntType(32)
_V8F32, _V8I8, _V8I32 = (ir.VectorType(t, 8) for t in (_F32, _I8, _I32))


def _splat(value: int) -> Any:
    return ir.Constant(_V8I32, [value] * 8)


def _at(builder: Any, address: Any, offset: int, vector: Any) -> Any:
    moved = builder.add(address, ir.Constant(address.type, offset))
    return builder.inttoptr(moved, vector.as_pointer())


def _prefetch(builder: Any, address: Any) -> None:
    """Ask for the codes that come AHEAD_BYTES later: hardware does not look beyond a page."""
    bytes_ = _I8.as_pointer()
    ask = cgutils.get_or_insert_function(
        builder.module,
        ir.FunctionType(ir.VoidType(), [bytes_, _I32, _I32, _I32]),
        "llvm.prefetch.p0i8",
    )
    ahead = builder.inttoptr(builder.add(address, ir.Constant(address.type, AHEAD_BYTES)), bytes_)
    read, keep, data = (ir.Constant(_I32, n) for n in (0, 3, 1))
    builder.call(ask, [ahead, read, keep, data])


def _add_products(builder: Any, values: list[Any], x: Any, sums: Any, scale: Any) -> None:
    """sums[8] += scale * (values[0] x[0:8] + values[1] x[8:16] + ...), as two chains."""
    fma = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(_V8F32, [_V8F32] * 3), "llvm.fma.v8f32"
    )
    chains = [ir.Constant(_V8F32, [0.0] * 8)] * 2
    for place, value in enumerate(values):
        x_8 = builder.load(_at(builder, x, 32 * place, _V8F32), align=4)
        chains[place % 2] = builder.call(fma, [value, x_8, chains[place % 2]])
    lane = builder.insert_element(ir.Constant(_V8F32, ir.Undefined), scale, ir.Constant(_I32, 0))
    scales = builder.shuffle_vector(lane, lane, _splat(0))
    kept = _at(builder, sums, 0, _V8F32)
    both = builder.fadd(*chains)
    builder.store(builder.call(fma, [both, scales, builder.load(kept, align=4)]), kept, align=4)


@intrinsic
def _nf4_block(typing: Any, codes: Any, x: Any, levels: Any, sums: Any, scale: Any) -> Any:
    """Addresses of 32 bytes of codes, of 64 numbers of x in the order of `_halves`, of the levels
    and of eight sums; the scale."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        codes, x, levels, sums, scale = arguments
        _prefetch(builder, codes)
        permute = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(_V8I32, [_V8I32, _V8I32]), "llvm.x86.avx2.permd"
        )
        tables = [builder.load(_at(builder, levels, 32 * h, _V8I32), align=4) for h in range(2)]
        values = []
        for step in range(4):
            packed = builder.load(_at(builder, codes, 8 * step, _V8I8), align=1)
            wide = builder.zext(packed, _V8I32)
            for index, top in ((builder.lshr(wide, _splat(4)), 24), (wide, 28)):
                lower, upper = (builder.call(permute, [t, index]) for t in tables)
                is_upper = builder.icmp_signed("<", builder.shl(wide, _splat(top)), _splat(0))
                values.append(builder.bitcast(builder.select(is_upper, upper, lower), _V8F32))
        _add_products(builder, values, x, sums, scale)
        return context.get_dummy_value()

    return types.void(codes, x, levels, sums, scale), codegen


@intrinsic
def _int8_block(typing: Any, codes: Any, x: Any, sums: Any, scale: Any) -> Any:
    """Addresses of 64 bytes of codes, of 64 numbers of x and of eight sums; the scale."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        codes, x, sums, scale = arguments
        _prefetch(builder, codes)
        values = []
        for step in range(8):
            packed = builder.load(_at(builder, codes, 8 * step, _V8I8), align=1)
            values.append(builder.sitofp(builder.sext(packed, _V8I32), _V8F32))
        _add_products(builder, values, x, sums, scale)
        return context.get_dummy_value()

    return types.void(codes, x, sums, scale), codegen


@numba.njit(parallel=True, cache=True)
def _nf4_avx2(codes, scale_codes, second, shift, offset, scale_table, levels, x, y):
    blocks = scale_codes.shape[1]
    for chunk in numba.prange((len(y) + ROWS - 1) // ROWS):
        sums = np.empty(8, np.float32)
        for r in range(chunk * ROWS, min(chunk * ROWS + ROWS, len(y))):
            sums[:] = 0
            for b in range(blocks):
                scale = scale_table[scale_codes[r, b]] * second[(r * blocks + b) >> shift] + offset
                _nf4_block(  # type: ignore[call-arg]
                    codes.ctypes.data + r * codes.shape[1] + b * 32,
                    x.ctypes.data + b * 256,
                    levels.ctypes.data,
                    sums.ctypes.data,
                    scale,
                )
            y[r] = sums.sum()


@numba.njit(parallel=True, cache=True)
def _nf4_plain(codes, scale_codes, second, shift, offset, scale_table, pairs, x, y):
    blocks = scale_codes.shape[1]
    for r in numba.prange(len(y)):
        total = np.float32(0)
        for b in range(blocks):
            scale = scale_table[scale_codes[r, b]] * second[(r * blocks + b) >> shift] + offset
            part = np.float32(0)
            for j in range(32):
                pair = pairs[codes[r, b * 32 + j]]
                part += pair[0] * x[b * 64 + 2 * j] + pair[1] * x[b * 64 + 2 * j + 1]
            total += scale * part
        y[r] = total


@numba.njit(parallel=True, cache=True)
def _int8(codes, scales, x, y):
    for chunk in numba.prange((len(y) + ROWS - 1) // ROWS):
        sums = np.empty(8, np.float32)
        for r in range(chunk * ROWS, min(chunk * ROWS + ROWS, len(y))):
            sums[:] = 0
            for b in range(scales.shape[1]):
                _int8_block(  # type: ignore[call-arg]
                    codes.ctypes.data + r * codes.shape[1] + b * 64,
                    x.ctypes.data + b * 256,
                    sums.ctypes.data,
                    scales[r, b],
                )
            y[r] = sums.sum()


def _halves(x_I: np.ndarray) -> np.ndarray:
    """Of every 16 numbers the even ones, then the odd ones."""
    return np.ascontiguousarray(x_I.reshape(-1, 8, 2).transpose(0, 2, 1)).reshape(-1)


def matvec(codec: str, parts: Arrays, x_I: np.ndarray, y_O: np.ndarray) -> None:
    """y = w x for a matrix in nf4 or int8; x and y are float32."""
    if codec == "int8":
        _int8(parts["codes"], parts["scales"], x_I, y_O)
        return
    head = nf4_parts(parts)
    if HAS_AVX2:
        _nf4_avx2(*head, NF4_LEVELS, _halves(x_I), y_O)
    else:
        _nf4_plain(*head, PAIRS, x_I, y_O)
