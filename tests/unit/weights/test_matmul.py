"""fp32 products by oneDNN: those of torch.mm, in blocks of rows."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from llvmlite import binding

from llamaweft.runtime import mkl_is_held_back
from llamaweft.weights import matmul
from llamaweft.weights.matmul import (
    BLOCK,
    GRAIN,
    add_product,
    padded,
    product,
    product_in_columns,
    row_blocks,
    summed_over_tokens,
)

COUNTS = [GRAIN, GRAIN + 1, 95, 200, BLOCK, BLOCK + 1, BLOCK + GRAIN, 3 * BLOCK + 245]


@pytest.fixture
def calls(monkeypatch) -> list[tuple[int, ...]]:
    """Products are oneDNN's, whatever the machine; (M, K, N) of each is listed."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch was built without oneDNN")
    made: list[tuple[int, ...]] = []
    multiply = matmul._onednn

    def listed(a_MK: torch.Tensor, b_KN: torch.Tensor) -> torch.Tensor:
        made.append((*a_MK.shape, b_KN.shape[1]))
        return multiply(a_MK, b_KN)

    monkeypatch.setattr(matmul, "BY_ONEDNN", True)
    monkeypatch.setattr(matmul, "_onednn", listed)
    return made


def differ(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("count", [*COUNTS, *range(GRAIN, 3 * GRAIN)])
def test_blocks_cover_all_rows_in_few_sizes(count: int) -> None:
    blocks = list(row_blocks(count))
    assert sorted({i for rows in blocks for i in range(rows.start, rows.stop)}) == [*range(count)]
    assert all(a.start < b.start and a.stop < b.stop for a, b in pairwise(blocks))
    sizes = [rows.stop - rows.start for rows in blocks]
    assert all(size % GRAIN == 0 and size <= BLOCK for size in sizes)
    assert sum(sizes) < count + GRAIN


@pytest.mark.parametrize("count", COUNTS)
def test_products_are_those_of_fp64(calls, count: int) -> None:
    torch.manual_seed(count)
    a, b = torch.randn(count, 96), torch.randn(96, 80)
    wanted = a.double() @ b.double()
    assert differ(product(a, b), wanted) < 1e-6
    wide = torch.full((count, 200), 7.0)
    product(a, b.t().contiguous().t(), out=wide[:, 64:144])
    assert differ(wide[:, 64:144], wanted) < 1e-6
    assert (wide[:, :64] == 7).all()
    assert (wide[:, 144:] == 7).all()
    turned = torch.empty(80, count)
    product(a, b, out=turned.t())
    assert differ(turned.t(), wanted) < 1e-6
    assert calls


@pytest.mark.parametrize("count", COUNTS)
def test_columns_go_in_blocks_as_rows_do(calls, count: int) -> None:
    torch.manual_seed(count)
    a, b_NK = torch.randn(80, 96), torch.randn(count, 96)
    found = product_in_columns(a, padded(b_NK).t(), torch.empty(80, count))
    assert differ(found, a.double() @ b_NK.double().t()) < 1e-6
    assert {columns % GRAIN for _, _, columns in calls} == {0}


@pytest.mark.parametrize("count", COUNTS)
def test_sums_are_added_to_once(calls, count: int) -> None:
    """Rows that two blocks compute are not added twice."""
    torch.manual_seed(count)
    a, b, start = torch.randn(count, 64), torch.randn(64, 48), torch.randn(count, 48)
    found = add_product(start.clone(), a, b)
    assert differ(found, start.double() + a.double() @ b.double()) < 1e-6
    turned = torch.randn(64, count).t()
    assert (
        differ(add_product(start.clone(), turned, b), start.double() + turned.double() @ b.double())
        < 1e-6
    )
    assert calls


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize(("left", "right"), [(16, 80), (80, 16), (BLOCK + 64, BLOCK + 32)])
def test_gradients_of_matrices_sum_over_all_tokens(calls, count, left, right) -> None:
    torch.manual_seed(count)
    a, b = torch.randn(count, left), torch.randn(count, right)
    assert differ(summed_over_tokens(a, b), a.double().t() @ b.double()) < 1e-6
    assert {rows for rows, _, _ in calls} == {min(left, right)}


def test_packs_of_many_lengths_make_products_of_few_sizes(calls) -> None:
    """oneDNN keeps a kernel for each size."""
    w = torch.randn(64, 32)
    for count in range(1, 1100):
        product(torch.zeros(count, 64), w)
        summed_over_tokens(torch.zeros(count, 16), torch.zeros(count, 64))
    assert len({rows for rows, _, columns in calls if columns == 32}) == BLOCK // GRAIN
    assert len({tokens for rows, tokens, _ in calls if rows == 16}) == BLOCK // GRAIN


@pytest.mark.parametrize("count", [GRAIN - 1, GRAIN, GRAIN + 1, 95, BLOCK - 1, BLOCK, BLOCK + 1])
def test_padding_makes_one_product_and_is_left_out(calls, count: int) -> None:
    torch.manual_seed(count)
    a, b = torch.randn(count, 64), torch.randn(64, 40)
    wide = padded(a)
    assert len(wide) == (count if count < GRAIN or count > BLOCK else -(-count // GRAIN) * GRAIN)
    assert wide is a or count % GRAIN
    found = product(wide, b, out=torch.empty(count, 40))
    assert differ(found, a.double() @ b.double()) < 1e-6
    assert len(calls) == (0 if count < GRAIN else 1 + (count > BLOCK))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_are_torchs(calls, dtype) -> None:
    a, b = torch.randn(300, 64).to(dtype), torch.randn(64, 40).to(dtype)
    assert torch.equal(product(a, b), a @ b)
    assert torch.equal(summed_over_tokens(a, a[:, :8]), a.t() @ a[:, :8])
    assert not calls


@pytest.mark.parametrize(
    ("name", "wide", "chosen"),
    [
        ("znver5", True, True),
        ("znver4", True, True),
        ("znver3", False, False),
        ("sapphirerapids", True, False),
    ],
)
def test_onednn_is_taken_where_mkl_leaves_out_avx512(monkeypatch, name, wide, chosen) -> None:
    monkeypatch.setattr(binding, "get_host_cpu_name", lambda: name)
    monkeypatch.setattr(binding, "get_host_cpu_features", lambda: {"avx512f": wide})
    assert mkl_is_held_back() == (chosen and torch.backends.mkldnn.is_available())
