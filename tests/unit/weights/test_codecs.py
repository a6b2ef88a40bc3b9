"""Codecs: equal to bitsandbytes', and the kernels equal to the same in torch operations."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch

from llamaweft.errors import UserError
from llamaweft.weights import kernels
from llamaweft.weights.codecs import (
    CODECS,
    NF4_LEVELS,
    codec_of,
    decode,
    encoded_bytes,
    layout,
    scale_levels,
)
from llamaweft.weights.frozen import FrozenWeight, encode


def matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=generator) * 0.02
    w[rows // 2, :64] = 0  # a block without scale
    w[0, 5] = 3.0
    return w


@pytest.mark.parametrize("shape", [(576, 1536), (1000, 4096), (3, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_is_that_of_bitsandbytes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    w = matrix(*shape).to(dtype)
    codes, state = bnb.quantize_4bit(w, blocksize=64, compress_statistics=True, quant_type="nf4")
    parts = encode("nf4", w)
    assert torch.equal(parts["codes"].view(-1), codes.view(-1))
    assert torch.equal(parts["scale_codes"].view(-1), state.absmax.view(-1))
    assert torch.equal(parts["scale_scales"], state.state2.absmax)
    assert float(parts["scale_offset"]) == float(state.offset)
    state.dtype = torch.float32
    assert torch.equal(decode("nf4", parts, torch.float32), bnb.dequantize_4bit(codes, state))


def test_the_levels_are_those_of_bitsandbytes() -> None:
    assert np.array_equal(scale_levels(), bnb.create_dynamic_map().numpy())
    assert np.array_equal(NF4_LEVELS, bnb.get_4bit_type("nf4", device="cpu").numpy())


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_windows_are_cut_out_of_the_whole(codec: str, dtype: torch.dtype) -> None:
    parts = encode(codec, matrix(200, 320))
    whole = decode(codec, parts, torch.float32).to(dtype)
    weight = FrozenWeight(codec, (200, 320), parts)
    assert torch.equal(weight.rows(17, 130, dtype), whole[17:130])
    assert torch.equal(weight.columns(64, 256, dtype), whole[:, 64:256])
    assert torch.equal(weight.dequantised(dtype), whole)
    index = torch.tensor([3, 199, 0, 3])
    assert torch.equal(weight.gather(index, dtype), whole[index])


@pytest.mark.skipif(not kernels.HAS_AVX2, reason="the kernel with permutations needs AVX2")
def test_the_kernel_without_avx2_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {k: v.numpy() for k, v in encode("nf4", matrix(70, 256)).items()}
    fast, plain = np.empty((50, 128), np.float32), np.empty((50, 128), np.float32)
    kernels.decode_nf4(parts, 11, 1, fast)
    monkeypatch.setattr(kernels, "HAS_AVX2", False)
    kernels.decode_nf4(parts, 11, 1, plain)
    assert np.array_equal(fast, plain)


def test_int8_is_within_half_a_step() -> None:
    w = matrix(64, 192)
    blocks = w.view(64, 3, 64)
    step = blocks.abs().amax(-1, keepdim=True) / 127
    error = (decode("int8", encode("int8", w), torch.float32).view_as(blocks) - blocks).abs()
    assert bool((error <= step * 0.5001 + 1e-9).all())


def test_sizes_and_what_is_held_in_what() -> None:
    shape = (4096, 14336)
    for codec in CODECS:
        made = encode(codec, torch.zeros(8, 128))
        assert encoded_bytes(codec, (8, 128)) == sum(part.nbytes for part in made.values())
    bits = 8 * encoded_bytes("nf4", shape) / (4096 * 14336)
    assert 4.1 < bits < 4.14
    assert codec_of("model.layers.3.mlp.up_proj.weight", "nf4", 2) == "nf4"
    assert codec_of("lm_head.weight", "nf4", 2) == "int8"
    assert codec_of("model.embed_tokens.weight", "bf16", 2) == "bf16"
    assert codec_of("model.norm.weight", "nf4", 1) == "fp32"


@pytest.mark.parametrize("codec", ["nf4", "int8"])
def test_a_row_that_is_no_whole_number_of_blocks_is_refused(codec: str) -> None:
    with pytest.raises(UserError, match=r"x has rows of 100 numbers.*64.*bf16"):
        layout(codec, (8, 100), "x")
