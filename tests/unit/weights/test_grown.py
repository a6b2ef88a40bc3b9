"""A frozen matrix with rows of new tokens gives what one whole matrix of the same numbers gives."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llamaweft.weights.codecs import CODECS, decode
from llamaweft.weights.frozen import FrozenWeight, encode
from llamaweft.weights.grown import ROWS, GrownWeight, row_parameters
from llamaweft.weights.linear import Embedding, Linear

ROWS_OF_BASE, WIDTH, NEW = 200, 64, 3
FIRST = [ROWS_OF_BASE, ROWS_OF_BASE - 1, 150]
"""Where the new rows begin: behind the base's, over its last one, in the midst of them."""


def grown(codec: str, first: int) -> tuple[GrownWeight, torch.Tensor]:
    """A weight, and its numbers put together by hand."""
    torch.manual_seed(1)
    parts = encode(codec, torch.randn(ROWS_OF_BASE, WIDTH))
    new_NE = nn.Parameter(torch.randn(NEW, WIDTH))
    whole = decode(codec, parts, torch.float32).clone()
    whole = torch.cat([whole, torch.zeros(max(0, first + NEW - ROWS_OF_BASE), WIDTH)])
    whole[first : first + NEW] = new_NE.detach()
    base = FrozenWeight(codec, (ROWS_OF_BASE, WIDTH), parts)
    return GrownWeight(base, first, new_NE), whole


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("first", FIRST)
def test_it_is_one_matrix(codec: str, first: int) -> None:
    weight, whole = grown(codec, first)
    assert weight.shape == whole.shape
    assert torch.equal(weight.dequantised(), whole)
    ids = torch.tensor([first, 0, first + 2, 7, first, 149, len(whole) - 1])
    assert torch.equal(weight.gather(ids, torch.float32), whole[ids])
    assert torch.equal(weight.gather(ids, torch.bfloat16), whole[ids].bfloat16())
    layer = Linear(WIDTH, ROWS_OF_BASE)
    layer.hold_grown(weight)
    for tokens in (1, 5, 200):
        x = torch.randn(tokens, WIDTH)
        torch.testing.assert_close(layer(x).detach(), x @ whole.t(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("first", FIRST)
def test_gradients_reach_the_new_rows_and_the_input_only(first: int) -> None:
    weight, whole = grown("fp32", first)
    embedding, layer = Embedding(ROWS_OF_BASE, WIDTH), Linear(WIDTH, ROWS_OF_BASE)
    embedding.hold_grown(weight)
    layer.hold(weight)  # as a tied head does
    whole.requires_grad_()
    ids = torch.tensor([first, 0, first + 2, 7, first])
    scale = torch.randn(len(ids), len(whole))
    (layer(embedding(ids, torch.float32)) * scale).sum().backward()
    ((whole[ids] @ whole.t()) * scale).sum().backward()
    new = slice(first, first + NEW)
    torch.testing.assert_close(weight.new_NE.grad, whole.grad[new], rtol=1e-5, atol=1e-4)
    model = nn.ModuleDict({"embedding": embedding, "head": layer})
    assert list(row_parameters(model)) == ["embedding"]
    assert [name for name, _ in model.named_parameters()] == [f"embedding.{ROWS}"]


def test_a_pack_without_a_new_token_gives_them_no_gradient_but_zero() -> None:
    weight, _ = grown("bf16", ROWS_OF_BASE)
    weight.gather(torch.tensor([1, 2]), torch.float32).sum().backward()
    assert torch.equal(weight.new_NE.grad, torch.zeros(NEW, WIDTH))
