"""Products with a frozen matrix: those of the decoded one, in tiles."""

from __future__ import annotations

import pytest
import torch

from llamaweft.weights import frozen, matvec
from llamaweft.weights.codecs import BLOCK, CODECS, decode
from llamaweft.weights.frozen import FrozenWeight, encode, tile_size
from llamaweft.weights.linear import Linear


def held(codec: str, rows: int, columns: int) -> tuple[FrozenWeight, torch.Tensor]:
    torch.manual_seed(1)
    parts = encode(codec, torch.randn(rows, columns))
    return FrozenWeight(codec, (rows, columns), parts), decode(codec, parts, torch.float32)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("tokens", [9, 200], ids=["few tokens", "many tokens"])
def test_products_and_their_gradients(codec: str, tokens: int, monkeypatch) -> None:
    """1e-6 of the norm: a smaller product may be summed in another order."""
    monkeypatch.setattr(frozen, "tile_size", lambda width, dtype: 256)
    rows, columns = 2 * 256 + 70, 256 + 64
    weight, w = held(codec, rows, columns)
    layer = Linear(columns, rows)
    layer.hold(weight)
    x = torch.randn(tokens, columns, requires_grad=True)
    y, g = layer(x), torch.randn(tokens, rows)
    y.backward(g)
    x64, w64, g64 = x.detach().double(), w.double(), g.double()
    y = y.detach()
    assert float((y - x64 @ w64.t()).norm() / (x64 @ w64.t()).norm()) < 1e-6
    assert float((x.grad - g64 @ w64).norm() / (g64 @ w64).norm()) < 1e-6


@pytest.mark.parametrize("codec", ["nf4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [640, 768, 960])
def test_tiles_of_columns_begin_with_a_block(codec: str, dtype: torch.dtype, width: int) -> None:
    """Down projections of small models, wider than a tile that is no power of two."""
    inputs = tile_size(width, dtype) + 5 * BLOCK
    weight, w = held(codec, width, inputs)
    g = torch.randn(40, width).to(dtype)
    wanted = g.double() @ w.double()
    found = weight.linear_backward(g)
    limit = 1e-6 if dtype == torch.float32 else 5e-3
    assert float((found - wanted).norm() / wanted.norm()) < limit
    with pytest.raises(ValueError, match="inside a block"):
        weight.columns(BLOCK + 1, 2 * BLOCK + 1, dtype)


def test_nothing_is_multiplied_for_an_input_without_gradient(monkeypatch) -> None:
    weight, _ = held("nf4", 64, 64)
    layer = Linear(64, 64)
    layer.hold(weight)
    calls = []
    monkeypatch.setattr(FrozenWeight, "linear_backward", lambda *a: calls.append(a))
    scale = torch.ones(64, requires_grad=True)
    (layer(torch.randn(3, 64)) * scale).sum().backward()
    assert scale.grad is not None
    assert not calls


def test_a_given_output_is_handed_on_and_its_gradient_is_the_products() -> None:
    for trained in (True, False):
        layer = Linear(64, 128)
        torch.nn.init.normal_(layer.weight)
        if not trained:
            layer.hold(held("int8", 128, 64)[0])
        x, given = torch.randn(5, 64), torch.randn(5, 128)
        grads = []
        for output in (None, given):
            leaf = x.clone().requires_grad_()
            y = layer(leaf, given=None if output is None else output.clone())
            assert output is None or torch.equal(y, given)
            y.backward(torch.ones_like(y))
            grads.append(leaf.grad)
        assert torch.equal(*grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("codec", CODECS)
def test_a_matrix_that_was_measured_with_can_be_trained_on(codec: str, dtype: torch.dtype) -> None:
    weight, _ = held(codec, 64, 64)
    x = torch.randn(2, 64).to(dtype)
    with torch.inference_mode():
        before = weight.linear(x).clone()
    assert torch.equal(weight.linear(x), before)


@pytest.mark.parametrize("codec", ["nf4", "int8"])
@pytest.mark.parametrize("has_avx2", [True, False])
def test_one_token_is_multiplied_straight_from_the_codes(codec, has_avx2, monkeypatch) -> None:
    """1e-6 of the norm: the sums run in another order."""
    if has_avx2 and not matvec.HAS_AVX2:
        pytest.skip("the kernel with permutations needs AVX2")
    monkeypatch.setattr(matvec, "HAS_AVX2", has_avx2)
    weight, w = held(codec, 77, 320)
    monkeypatch.setattr(weight, "rows", None)  # nothing may be decoded
    x = torch.randn(1, 320)
    expected = x.double() @ w.double().t()
    assert float((weight.linear(x) - expected).norm() / expected.norm()) < 1e-6
    narrow = weight.linear(x.bfloat16())
    assert narrow.dtype == torch.bfloat16
    assert float((narrow - expected).norm() / expected.norm()) < 1e-2
