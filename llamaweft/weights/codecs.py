"""Codecs: how a frozen matrix is held, as named parts that can be cut by rows.

nf4   4 bits a weight in blocks of 64 along a row, the blocks' scales in 8 bits: the format and the
      values of bitsandbytes' NF4 with double quantisation (Dettmers et al., 2023: QLoRA)
int8  8 bits a weight in groups of 64 along a row, each with an fp32 scale: absmax / 127
bf16, fp32   as they are

O: rows (output features)   I: columns (input features)   B: blocks of a row, I / 64
S: scale groups of 256 blocks, counted over the whole matrix
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from llamaweft.errors import UserError

BLOCK = 64
"""Weights that share a scale; no block crosses a row."""

SCALE_GROUP = 256
"""Scales of nf4 that share a second scale."""

NF4_LEVELS = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    dtype=np.float32,
)  # fmt: skip
"""The 16 levels: quantiles of the normal distribution (QLoRA, appendix E)."""


@dataclass(frozen=True)
class Part:
    """One array of an encoded matrix: its dtype and shape."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize


CODECS = ("nf4", "int8", "bf16", "fp32")
PLAIN = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""Codecs that hold the numbers themselves."""


def layout(codec: str, shape: tuple[int, ...], name: str) -> dict[str, Part]:
    """The parts of a matrix of this shape. `name` stands in errors.

    Raises UserError where a row is no whole number of blocks.
    """
    if codec in PLAIN:
        return {"values": Part(PLAIN[codec], shape)}
    rows, columns = shape
    if columns % BLOCK:
        raise UserError(
            f"{name} has rows of {columns} numbers, and {codec} needs a multiple of {BLOCK}; set "
            "base_weights: bf16"
        )
    blocks = columns // BLOCK
    if codec == "int8":
        return {
            "codes": Part(torch.int8, (rows, columns)),
            "scales": Part(torch.float32, (rows, blocks)),
        }
    groups = -(-rows * blocks // SCALE_GROUP)
    return {
        "codes": Part(torch.uint8, (rows, columns // 2)),
        "scale_codes": Part(torch.uint8, (rows, blocks)),
        "scale_scales": Part(torch.float32, (groups,)),
        "scale_offset": Part(torch.float32, (1,)),
    }


def encoded_bytes(codec: str, shape: tuple[int, ...]) -> int:
    """Bytes of a matrix of this shape in a codec."""
    return sum(part.nbytes for part in layout(codec, shape, "a matrix").values())


def codec_of(name: str, codec: str, ndim: int) -> str:
    """The codec of one tensor of a model whose layers are held in `codec`: vectors are fp32, and
    embedding and head int8 where the layers are nf4."""
    if ndim == 1:
        return "fp32"
    return "int8" if codec == "nf4" and ".layers." not in name else codec


@lru_cache(maxsize=1)
def scale_levels() -> np.ndarray:
    """The 256 sorted levels, between -0.993 and 1, that hold nf4's scales: bitsandbytes' signed
    dynamic map (Dettmers et al., 2022: 8-bit Optimizers via Block-wise Quantization, 2.2).

    For each decade 10^-6 ... 1 the midpoints of 2^i equal steps from 0.1 to 1, of both signs;
    then 0 and 1.
    """
    levels = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        means = ((edges[:-1] + edges[1:]) / 2 * 10 ** (exponent - 6)).tolist()
        levels += means + [-mean for mean in means]
    return np.array(sorted(levels), dtype=np.float32)


def midpoints(levels: np.ndarray) -> np.ndarray:
    """Where rounding to sorted levels goes from one to the next."""
    return (levels[:-1] + levels[1:]) / np.float32(2)


def encode_scales(scales_OB: Tensor) -> dict[str, Tensor]:
    """The second quantisation of nf4: fp32 scales -> 8-bit codes around their mean.

    As bitsandbytes' CPU code does it: a scale is rounded to 65,536 equal steps before the nearest
    level is looked up. Its CUDA kernel leaves that step out, and 0.2% of the codes differ by one.
    """
    flat = scales_OB.reshape(-1)
    offset = flat.mean()
    centred = flat - offset
    groups = -(-len(centred) // SCALE_GROUP)
    padded = torch.zeros(groups * SCALE_GROUP)
    padded[: len(centred)] = centred
    grouped = padded.view(groups, SCALE_GROUP)
    largest = grouped.abs().amax(dim=1)
    scaled = grouped * (1 / largest.clamp(min=1e-38))[:, None]
    edges = torch.from_numpy(midpoints(scale_levels()))
    stepped = ((scaled.view(-1) + 1) * 32767.5 + 0.5).floor() / 32767.5 - 1
    codes = torch.bucketize(stepped, edges)[: len(flat)]
    return {
        "scale_codes": codes.to(torch.uint8).view(scales_OB.shape),
        "scale_scales": largest,
        "scale_offset": offset[None],
    }


def decode_scales(parts: dict[str, Tensor]) -> Tensor:
    """scales_OB in fp32 from nf4's 8-bit codes."""
    codes = parts["scale_codes"]
    levels = torch.from_numpy(scale_levels()).to(codes.device)[codes.reshape(-1).long()]
    group = int(parts["scale_group"]) if "scale_group" in parts else SCALE_GROUP
    second = parts["scale_scales"].repeat_interleave(group)[: len(levels)]
    return (levels * second + parts["scale_offset"]).view(codes.shape)


def cut(codec: str, parts: dict[str, Tensor], dim: int, part: int, count: int) -> dict[str, Tensor]:
    """Part `part` of `count` equal ones of a matrix, by rows (dim 0) or columns (dim 1): the same
    codes, so the same numbers. Views where they can be.

    nf4's groups of scales run over the whole matrix, so a part has smaller ones (`scale_group`
    blocks each), none of which crosses a row. Raises ValueError where the dimension has not so many
    equal parts of whole blocks.
    """
    rows, columns = next(iter(parts.values())).shape
    columns *= 2 if codec == "nf4" else 1
    size, unit = (rows, 1) if dim == 0 else (columns, 1 if codec in PLAIN else BLOCK)
    if size % (count * unit):
        raise ValueError(f"{size} {'rows' if dim == 0 else 'columns'} in {count} parts")
    first = size // count * part
    old = int(parts.get("scale_group", SCALE_GROUP))

    def window(array: Tensor, numbers: int) -> Tensor:
        """numbers: of the matrix, for each entry along the columns."""
        if dim == 0:
            return array[first : first + size // count]
        return array[:, first // numbers : (first + size // count) // numbers]

    if codec in PLAIN:
        return {"values": window(parts["values"], 1)}
    if codec == "int8":
        return {"codes": window(parts["codes"], 1), "scales": window(parts["scales"], BLOCK)}
    scale_codes = window(parts["scale_codes"], BLOCK)
    all_blocks, blocks = columns // BLOCK, scale_codes.shape[1]
    group = math.gcd(old, all_blocks, blocks)
    top, left = (first, 0) if dim == 0 else (0, first // BLOCK)
    row = torch.arange(top, top + len(scale_codes))[:, None] * all_blocks
    place = row + torch.arange(left, left + blocks, group)
    return {
        "codes": window(parts["codes"], 2),
        "scale_codes": scale_codes,
        "scale_scales": parts["scale_scales"][(place // old).flatten().to(scale_codes.device)],
        "scale_offset": parts["scale_offset"],
        "scale_group": torch.tensor([group]),
    }


def decode(codec: str, parts: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """The whole matrix in torch operations, on whatever device the parts are: the reference for
    the kernels, and what has no kernel."""
    if codec in PLAIN:
        return parts["values"].to(dtype)
    codes = parts["codes"]
    if codec == "int8":
        values, scales_OB = codes.float(), parts["scales"]
    else:
        pairs = torch.stack([codes >> 4, codes & 15], dim=-1).flatten(1)
        values = torch.from_numpy(NF4_LEVELS).to(codes.device)[pairs.long()]
        scales_OB = decode_scales(parts)
    return (values.unflatten(1, (-1, BLOCK)) * scales_OB[:, :, None]).flatten(1).to(dtype)


def decode_nf4_on_cuda(parts: dict[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The whole matrix by bitsandbytes' kernel, which reads the same bytes."""
    import bitsandbytes.functional as bnb

    return bnb.dequantize_4bit(
        parts["codes"].view(-1, 1),
        absmax=decode_scales(parts).view(-1),
        out=torch.empty(shape, dtype=dtype, device=parts["codes"].device),
        blocksize=BLOCK,
        quant_type="nf4",
    )
