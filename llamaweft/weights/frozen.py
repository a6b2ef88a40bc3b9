"""A matrix that is never trained: held in a codec, multiplied without a whole copy.

On a CPU a product takes the matrix in tiles: a few rows (forward) or columns (backward) are
decoded into a buffer that stays in the cache and multiplied at once. No sum is cut in two, so the
tiles change no rounding beyond that of a smaller product. On a GPU the whole matrix is decoded for
the moment of the product. One token alone is multiplied straight from the codes (matvec.py).

T: tokens   I: input features   O: output features   N: rows asked for
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from llamaweft.weights.codecs import (
    BLOCK,
    PLAIN,
    cut,
    decode,
    decode_nf4_on_cuda,
    encode_scales,
)
from llamaweft.weights.kernels import HAS_AVX2, decode_int8, decode_nf4, encode_rows
from llamaweft.weights.matmul import padded, product, product_in_columns, sizes_for
from llamaweft.weights.matvec import matvec

TILE = 512
TILE_BYTES = 4 * 2**20
"""Rows (or columns) of a tile in fp32, twice as many in half the bytes, or as many as have so many
bytes: small enough for the cache, large enough for the product (benchmarks/bench_tiles.py)."""

RANDOM_ROWS = 1024
"""Rows of a random matrix that are drawn at once."""

FEW_TOKENS = 128
"""Up to so many tokens a product w x^T is faster than x w^T (docs/log.md)."""


def tile_size(width: int, dtype: torch.dtype) -> int:
    """Rows of `width` numbers, or columns, that are decoded and multiplied at once on a CPU: whole
    blocks of the codecs."""
    size = max(TILE * 4, TILE_BYTES // width) // dtype.itemsize
    return size // BLOCK * BLOCK


class Scratch:
    """One buffer for decoded tiles, shared by all matrices of a model and grown to the largest."""

    def __init__(self) -> None:
        self._buffers: dict[torch.dtype, Tensor] = {}

    def take(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        buffer = self._buffers.get(dtype)
        if buffer is None or buffer.numel() < rows * columns:
            with torch.inference_mode(False):  # it outlives an evaluation that asks first
                buffer = self._buffers[dtype] = torch.empty(rows * columns, dtype=dtype)
        return buffer[: rows * columns].view(rows, columns)


class FrozenWeight:
    """w_OI in a codec.

    parts: its arrays (weights/codecs.py), on one device. verify: called once, before the first
    read; raises when what is held is not what was written.
    """

    _source: Callable[[], dict[str, Tensor]] | None = None
    _addresses: list[int] | None = None

    def __init__(
        self,
        codec: str,
        shape: tuple[int, ...],
        parts: dict[str, Tensor],
        *,
        scratch: Scratch | None = None,
        verify: Callable[[], None] | None = None,
    ) -> None:
        self.codec, self.shape, self._parts = codec, torch.Size(shape), parts
        self._scratch = scratch or Scratch()
        self._verify = verify
        self._arrays = self._for_kernels()

    def _for_kernels(self) -> dict[str, np.ndarray]:
        on_cpu = all(part.device.type == "cpu" for part in self._parts.values())
        has_kernel = on_cpu and self.codec not in PLAIN
        array = Tensor.numpy if self._source is None else _array_at
        return {k: array(part) for k, part in self._parts.items()} if has_kernel else {}

    @property
    def device(self) -> torch.device:
        parts = self._parts if self._source is None else self._source()
        return next(iter(parts.values())).device

    @property
    def parts(self) -> dict[str, Tensor]:
        """The arrays, verified."""
        if self._verify is not None:
            self._verify()
            self._verify = None
        if self._source is not None:
            self._follow(self._source())
        return self._parts

    def read_from(self, source: Callable[[], dict[str, Tensor]]) -> None:
        """Have its arrays from `source` at every use from now on: they may lie elsewhere each time,
        and RuntimeError is raised where they are not in memory at all."""
        self._source = source
        self._parts, self._arrays, self._addresses = {}, {}, []

    def _follow(self, parts: dict[str, Tensor]) -> None:
        if not all(part.untyped_storage().nbytes() for part in parts.values()):
            raise RuntimeError(f"a matrix of shape {tuple(self.shape)} is read while it is away")
        addresses = [part.data_ptr() for part in parts.values()]
        if addresses != self._addresses:
            self.place(parts)
            self._addresses = addresses

    def cut(self, dim: int, part: int, count: int) -> FrozenWeight:
        """Part `part` of `count` equal ones, by rows (dim 0) or columns (dim 1): the same numbers.
        Raises ValueError where it cannot be cut so (weights/codecs.py)."""
        parts = cut(self.codec, self.parts, dim, part, count)
        shape = list(self.shape)
        shape[dim] //= count
        held = {name: array.contiguous() for name, array in parts.items()}
        return FrozenWeight(self.codec, tuple(shape), held, scratch=self._scratch)

    def to(self, device: torch.device) -> FrozenWeight:
        """The same matrix on `device`; itself where it is there already."""
        if device.type == self.device.type:
            return self
        parts = {name: part.to(device) for name, part in self.parts.items()}
        return FrozenWeight(self.codec, tuple(self.shape), parts)

    def place(self, parts: dict[str, Tensor]) -> None:
        """Read from these arrays from now on: the same numbers, elsewhere."""
        self._parts = parts
        self._arrays = self._for_kernels()

    def dequantised(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """w_OI, whole: a copy, or the held numbers themselves where they are of that dtype."""
        if self._arrays and dtype == torch.float32:
            return self._decode(0, self.shape[0], 0, self.shape[1], torch.empty(self.shape))
        if self.codec == "nf4" and self.device.type == "cuda":
            return decode_nf4_on_cuda(self.parts, self.shape, dtype)
        return decode(self.codec, self.parts, dtype)

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """w[start:stop] in `dtype`; valid until the next call on any matrix of the model."""
        return self._window(start, stop, 0, self.shape[1], dtype)

    def columns(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """w[:, start:stop] in `dtype`; valid until the next call on any matrix of the model."""
        return self._window(0, self.shape[0], start, stop, dtype)

    def _window(self, r0: int, r1: int, c0: int, c1: int, dtype: torch.dtype) -> Tensor:
        if self.codec in PLAIN:
            values = self.parts["values"][r0:r1, c0:c1]
            if values.dtype == dtype:
                return values
            return self._scratch.take(r1 - r0, c1 - c0, dtype).copy_(values)
        direct = dtype == torch.float32 or (
            dtype == torch.bfloat16 and self.codec == "nf4" and HAS_AVX2
        )
        if direct:
            return self._decode(r0, r1, c0, c1, self._scratch.take(r1 - r0, c1 - c0, dtype))
        narrow = self._scratch.take(r1 - r0, c1 - c0, dtype)
        step = max(1, TILE_BYTES // (4 * (c1 - c0)))  # what is narrowed is in the cache yet
        for start in range(r0, r1, step):
            stop = min(start + step, r1)
            wide = self._scratch.take(stop - start, c1 - c0, torch.float32)
            narrow[start - r0 : stop - r0] = self._decode(start, stop, c0, c1, wide)
        return narrow

    def _decode(self, r0: int, r1: int, c0: int, c1: int, out: Tensor) -> Tensor:
        """Fill `out` with the window. Raises ValueError where it begins inside a block."""
        if c0 % BLOCK:
            raise ValueError(f"column {c0} is inside a block of {BLOCK}")
        _ = self.parts
        target = out.view(torch.uint16) if out.dtype == torch.bfloat16 else out
        kernel = decode_nf4 if self.codec == "nf4" else decode_int8
        kernel(self._arrays, r0, c0 // BLOCK, target.numpy())
        return out

    def row_squares(self) -> Tensor:
        """||w_o||^2 of every row in fp64, decoded in tiles of rows; whole on a GPU."""
        tile = tile_size(self.shape[1], torch.float32)
        if self.device.type != "cpu":
            tiles = list(self.dequantised().split(tile))
            return torch.cat([_squares(rows_NI) for rows_NI in tiles])
        starts = range(0, self.shape[0], tile)
        ends = [min(start + tile, self.shape[0]) for start in starts]
        return torch.cat(
            [
                _squares(self.rows(start, stop, torch.float32))
                for start, stop in zip(starts, ends, strict=True)
            ]
        )

    def gather(self, index_N: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows w[index], decoded alone: what an embedding needs."""
        parts = self.parts
        if self.codec in PLAIN:
            return parts["values"][index_N].to(dtype)
        taken = {"codes": parts["codes"][index_N]}
        if self.codec == "int8":
            return decode("int8", taken | {"scales": parts["scales"][index_N]}, dtype)
        return torch.cat([self.rows(int(i), int(i) + 1, dtype).clone() for i in index_N])

    def linear(self, x_TI: Tensor) -> Tensor:
        """y_TO = x w^T in the dtype of x."""
        if x_TI.device.type != "cpu":
            return x_TI @ self.dequantised(x_TI.dtype).t()
        if len(x_TI) == 1 and self.codec not in PLAIN:
            return self._matvec(x_TI)
        outputs = self.shape[0]
        tile = tile_size(self.shape[1], x_TI.dtype)
        sizes, few = sizes_for(x_TI), FEW_TOKENS
        if sizes is not None and x_TI.dtype == torch.float32:
            few = sizes.grain - 1
        if len(x_TI) <= few:  # matrix first: the product then has many rows, not few
            x_IT = padded(x_TI).t().contiguous()
            y_OT = x_TI.new_empty(outputs, len(x_TI))
            for start in range(0, outputs, tile):
                stop = min(start + tile, outputs)
                product_in_columns(self.rows(start, stop, x_TI.dtype), x_IT, out=y_OT[start:stop])
            return y_OT.t().contiguous()
        y_TO, x_TI = x_TI.new_empty(len(x_TI), outputs), padded(x_TI)
        for start in range(0, outputs, tile):
            stop = min(start + tile, outputs)
            product(x_TI, self.rows(start, stop, x_TI.dtype).t(), out=y_TO[:, start:stop])
        return y_TO

    def _matvec(self, x_1I: Tensor) -> Tensor:
        """The product for one token, without decoding: in fp32, whatever the dtype of x."""
        _ = self.parts
        y_1O = torch.empty(1, self.shape[0])
        x_I = x_1I.detach().float().contiguous().view(-1)
        matvec(self.codec, self._arrays, x_I.numpy(), y_1O.view(-1).numpy())
        return y_1O.to(x_1I.dtype)

    def linear_backward(self, g_TO: Tensor) -> Tensor:
        """g_TI = g_TO w, the gradient of `linear`'s input."""
        if g_TO.device.type != "cpu":
            return g_TO @ self.dequantised(g_TO.dtype)
        inputs = self.shape[1]
        g_TI, g_TO = g_TO.new_empty(len(g_TO), inputs), padded(g_TO)
        tile = tile_size(self.shape[0], g_TO.dtype)
        for start in range(0, inputs, tile):
            stop = min(start + tile, inputs)
            product(g_TO, self.columns(start, stop, g_TO.dtype), out=g_TI[:, start:stop])
        return g_TI


def _array_at(part: Tensor) -> np.ndarray:
    """The memory of a tensor as it is now. `Tensor.numpy` would keep it from being given back."""
    buffer = (ctypes.c_char * part.nbytes).from_address(part.data_ptr())
    kind = torch.empty(0, dtype=part.dtype).numpy().dtype
    return np.frombuffer(memoryview(buffer), kind).reshape(part.shape)


def _squares(rows_NI: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows_NI, dim=1, dtype=torch.float64).square()


def encode(codec: str, w_OI: Tensor) -> dict[str, Tensor]:
    """The parts of a whole matrix in memory: for tests and small matrices; a store is written in
    chunks of rows (weights/build.py)."""
    if codec in PLAIN:
        return {"values": w_OI.to(PLAIN[codec])}
    return _encoded(codec, [w_OI])


def random_frozen(codec: str, shape: tuple[int, int], std: float, scratch: Scratch) -> FrozenWeight:
    """A matrix of normal numbers, for measuring: no more of it than RANDOM_ROWS is ever whole."""
    if codec in PLAIN:
        values = torch.empty(shape, dtype=PLAIN[codec]).normal_(0, std)
        return FrozenWeight(codec, shape, {"values": values}, scratch=scratch)
    counts = [min(RANDOM_ROWS, shape[0] - start) for start in range(0, shape[0], RANDOM_ROWS)]
    chunks = (torch.empty(count, shape[1]).normal_(0, std) for count in counts)
    return FrozenWeight(codec, shape, _encoded(codec, chunks), scratch=scratch)


def _encoded(codec: str, chunks: Iterable[Tensor]) -> dict[str, Tensor]:
    """The parts of a matrix that comes in chunks of rows."""
    rows = [encode_rows(codec, np.ascontiguousarray(chunk.float().numpy())) for chunk in chunks]
    parts = {name: torch.cat([torch.from_numpy(r[name]) for r in rows]) for name in rows[0]}
    if codec == "nf4":
        parts |= encode_scales(parts.pop("scales"))
    return parts
