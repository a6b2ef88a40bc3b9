"""Encoding and decoding on the CPU: numba kernels that use every core.

A decoding kernel writes a window of a matrix (rows r0:r1, blocks b0:b1) into a buffer small enough
for the cache, where the matrix product finds it. On x86 with AVX2 the 16 levels of nf4 live in two
registers and a permutation looks eight up at once; elsewhere a table of byte -> two levels does.

O: rows   I: columns   B: blocks of 64 columns
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from llamaweft.weights.codecs import NF4_LEVELS, SCALE_GROUP, midpoints, scale_levels

PAIRS = np.stack([NF4_LEVELS[np.arange(256) >> 4], NF4_LEVELS[np.arange(256) & 15]], 1)
EDGES = midpoints(NF4_LEVELS)
SCALES = scale_levels()
SHIFT = SCALE_GROUP.bit_length() - 1
HAS_AVX2 = bool(binding.get_host_cpu_features().get("avx2", False))

_F32, _I8, _I16, _I32 = ir.FloatType(), ir.IntType(8), ir.IntType(16), ir.IntType(32)
_V8F32, _V8I32 = ir.VectorType(_F32, 8), ir.VectorType(_I32, 8)


def _splat(vector: Any, value: float | int) -> Any:
    return ir.Constant(vector, [value] * vector.count)


def _bf16_bits(builder: Any, values: Any) -> Any:
    """Eight floats -> eight int32 that hold the bits of the nearest bf16, ties to even."""
    bits = builder.bitcast(values, _V8I32)
    odd = builder.and_(builder.lshr(bits, _splat(_V8I32, 16)), _splat(_V8I32, 1))
    rounded = builder.add(builder.add(bits, odd), _splat(_V8I32, 0x7FFF))
    return builder.lshr(rounded, _splat(_V8I32, 16))


def _block_codegen(to_bf16: bool) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        codes, out, levels, scale = arguments
        permute = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(_V8I32, [_V8I32, _V8I32]), "llvm.x86.avx2.permd"
        )

        def at(address: Any, offset: int, vector: Any) -> Any:
            moved = builder.add(address, ir.Constant(address.type, offset))
            return builder.inttoptr(moved, vector.as_pointer())

        lane = builder.insert_element(
            ir.Constant(_V8F32, ir.Undefined), scale, ir.Constant(_I32, 0)
        )
        scales = builder.shuffle_vector(lane, lane, _splat(_V8I32, 0))
        tables = []
        for half in range(2):
            table = builder.load(at(levels, 32 * half, _V8F32), align=4)
            scaled = builder.fmul(table, scales)
            tables.append(
                _bf16_bits(builder, scaled) if to_bf16 else builder.bitcast(scaled, _V8I32)
            )
        bytes4 = ir.VectorType(_I8, 4)
        order = ir.Constant(_V8I32, [i // 2 + 4 * (i % 2) for i in range(8)])
        for step in range(8):
            packed = builder.load(at(codes, 4 * step, bytes4), align=1)
            high = builder.lshr(packed, _splat(bytes4, 4))
            low = builder.and_(packed, _splat(bytes4, 15))
            index = builder.zext(builder.shuffle_vector(high, low, order), _V8I32)
            lower, upper = (builder.call(permute, [table, index]) for table in tables)
            is_upper = builder.icmp_signed(">", index, _splat(_V8I32, 7))
            found = builder.select(is_upper, upper, lower)
            if to_bf16:
                halves = builder.trunc(found, ir.VectorType(_I16, 8))
                builder.store(halves, at(out, 16 * step, halves.type), align=2)
            else:
                builder.store(found, at(out, 32 * step, _V8I32), align=4)
        return context.get_dummy_value()

    return codegen


@intrinsic
def _block_to_fp32(typing: Any, codes: Any, out: Any, levels: Any, scale: Any) -> Any:
    """Addresses of 32 bytes of codes, of 64 floats to write and of the levels; the scale."""
    return types.void(codes, out, levels, scale), _block_codegen(to_bf16=False)


@intrinsic
def _block_to_bf16(typing: Any, codes: Any, out: Any, levels: Any, scale: Any) -> Any:
    """As `_block_to_fp32`, 64 bf16 as uint16."""
    return types.void(codes, out, levels, scale), _block_codegen(to_bf16=True)


@numba.njit(parallel=True, cache=True)
def _nf4_avx2_fp32(codes, scale_codes, second, shift, offset, scale_table, levels, r0, b0, out):
    blocks = scale_codes.shape[1]
    for row in numba.prange(out.shape[0]):
        r = r0 + row
        for block in range(out.shape[1] // 64):
            b = b0 + block
            scale = scale_table[scale_codes[r, b]] * second[(r * blocks + b) >> shift] + offset
            _block_to_fp32(  # type: ignore[call-arg]
                codes.ctypes.data + r * codes.shape[1] + b * 32,
                out.ctypes.data + (row * out.shape[1] + block * 64) * 4,
                levels.ctypes.data,
                scale,
            )


@numba.njit(parallel=True, cache=True)
def _nf4_avx2_bf16(codes, scale_codes, second, shift, offset, scale_table, levels, r0, b0, out):
    blocks = scale_codes.shape[1]
    for row in numba.prange(out.shape[0]):
        r = r0 + row
        for block in range(out.shape[1] // 64):
            b = b0 + block
            scale = scale_table[scale_codes[r, b]] * second[(r * blocks + b) >> shift] + offset
            _block_to_bf16(  # type: ignore[call-arg]
                codes.ctypes.data + r * codes.shape[1] + b * 32,
                out.ctypes.data + (row * out.shape[1] + block * 64) * 2,
                levels.ctypes.data,
                scale,
            )


@numba.njit(parallel=True, cache=True)
def _nf4_plain_fp32(codes, scale_codes, second, shift, offset, scale_table, pairs, r0, b0, out):
    blocks = scale_codes.shape[1]
    for row in numba.prange(out.shape[0]):
        r = r0 + row
        for block in range(out.shape[1] // 64):
            b = b0 + block
            scale = scale_table[scale_codes[r, b]] * second[(r * blocks + b) >> shift] + offset
            for j in range(32):
                code = codes[r, b * 32 + j]
                out[row, block * 64 + 2 * j] = pairs[code, 0] * scale
                out[row, block * 64 + 2 * j + 1] = pairs[code, 1] * scale


@numba.njit(parallel=True, cache=True)
def _int8_fp32(codes, scales, r0, b0, out):
    blocks = out.shape[1] // 64
    for row in numba.prange(out.shape[0]):
        row_codes = codes[r0 + row, b0 * 64 : (b0 + blocks) * 64]
        for block in range(blocks):
            found = row_codes[block * 64 : block * 64 + 64]
            target = out[row, block * 64 : block * 64 + 64]
            scale = scales[r0 + row, b0 + block]
            for j in range(64):
                target[j] = np.float32(found[j]) * scale


@numba.njit(parallel=True, cache=True)
def _nf4_encode(w, edges, codes, scales):
    for r in numba.prange(w.shape[0]):
        levels = np.empty(64, np.uint8)
        scaled = np.empty(64, np.float32)
        for b in range(w.shape[1] // 64):
            values = w[r, b * 64 : b * 64 + 64]
            largest = np.float32(0)
            for j in range(64):
                largest = max(largest, abs(values[j]))
            scales[r, b] = largest
            inverse = np.float32(1) / max(largest, np.float32(1e-38))
            for j in range(64):
                scaled[j] = values[j] * inverse
                levels[j] = 0
            for edge in edges:
                for j in range(64):
                    levels[j] += np.uint8(edge < scaled[j])
            packed = codes[r, b * 32 : b * 32 + 32]
            for j in range(32):
                packed[j] = (levels[2 * j] << 4) | levels[2 * j + 1]


@numba.njit(parallel=True, cache=True)
def _int8_encode(w, codes, scales):
    for r in numba.prange(w.shape[0]):
        for b in range(w.shape[1] // 64):
            values = w[r, b * 64 : b * 64 + 64]
            packed = codes[r, b * 64 : b * 64 + 64]
            largest = np.float32(0)
            for j in range(64):
                largest = max(largest, abs(values[j]))
            inverse = np.float32(127) / max(largest, np.float32(1e-38))
            scales[r, b] = largest / np.float32(127)
            for j in range(64):
                packed[j] = np.int8(np.rint(values[j] * inverse))


Arrays = dict[str, np.ndarray]


def nf4_parts(parts: Arrays) -> tuple[Any, Any, Any, int, Any, Any]:
    """What every kernel that reads nf4 begins its arguments with. Groups of scales are powers of
    two, so a shift finds a block's group."""
    return (
        parts["codes"],
        parts["scale_codes"],
        parts["scale_scales"],
        int(parts["scale_group"][0]).bit_length() - 1 if "scale_group" in parts else SHIFT,
        parts["scale_offset"][0],
        SCALES,
    )


def decode_nf4(parts: Arrays, r0: int, b0: int, out: np.ndarray) -> None:
    """The window of nf4 at row r0 and block b0 into `out`: float32, or uint16 for bf16's bits
    (only where HAS_AVX2)."""
    head = nf4_parts(parts)
    if out.dtype == np.uint16:
        _nf4_avx2_bf16(*head, NF4_LEVELS, r0, b0, out)
    elif HAS_AVX2:
        _nf4_avx2_fp32(*head, NF4_LEVELS, r0, b0, out)
    else:
        _nf4_plain_fp32(*head, PAIRS, r0, b0, out)


def decode_int8(parts: Arrays, r0: int, b0: int, out: np.ndarray) -> None:
    """The window of int8 at row r0 and block b0 into float32 `out`."""
    _int8_fp32(parts["codes"], parts["scales"], r0, b0, out)


def encode_nf4(w_OI: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """fp32 rows -> (codes, fp32 scales), before the scales' own quantisation. Rounding is to the
    nearest level, the lower one at a tie, as in bitsandbytes."""
    rows, columns = w_OI.shape
    codes = np.empty((rows, columns // 2), np.uint8)
    scales = np.empty((rows, columns // 64), np.float32)
    _nf4_encode(w_OI, EDGES, codes, scales)
    return codes, scales


def encode_int8(w_OI: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """fp32 rows -> (codes, fp32 scales); ties to even."""
    rows, columns = w_OI.shape
    codes = np.empty((rows, columns), np.int8)
    scales = np.empty((rows, columns // 64), np.float32)
    _int8_encode(w_OI, codes, scales)
    return codes, scales


def encode_rows(codec: str, w_OI: np.ndarray) -> Arrays:
    """fp32 rows in nf4 or int8: `codes` and fp32 `scales`; nf4's scales are not quantised yet."""
    codes, scales = (encode_nf4 if codec == "nf4" else encode_int8)(w_OI)
    return {"codes": codes, "scales": scales}
