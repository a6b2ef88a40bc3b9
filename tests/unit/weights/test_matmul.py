"""Products by oneDNN: those of torch.mm, in blocks of rows."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from llvmlite import binding

from llamaweft.runtime import mkl_is_held_back
from llamaweft.weights import matmul
from llamaweft.weights.matmul import (
    BF16,
    FP32,
    Sizes,
    add_product,
    add_thin_product,
    kernel_bytes,
    padded,
    product,
    product_in_columns,
    row_blocks,
    sizes_for,
    summed_over_tokens,
)

KINDS = [(torch.float32, FP32, 1e-6), (torch.bfloat16, BF16, 5e-3)]
"""A dtype, the sizes of its products, and how far off they may be, by norm."""


def counts(sizes: Sizes) -> list[int]:
    block, grain = sizes
    return [grain, grain + 1, 95, 200, block, block + 1, block + grain, 3 * block + 245]


CASES = [
    pytest.param(dtype, sizes, limit, count, id=f"{dtype}-{count}".removeprefix("torch."))
    for dtype, sizes, limit in KINDS
    for count in counts(sizes)
]


@pytest.fixture
def calls(monkeypatch) -> list[tuple[int, ...]]:
    """fp32 products are oneDNN's, whatever the machine; (M, K, N) of each is listed."""
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


def drawn(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(*shape).to(dtype)


def differ(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("sizes", [FP32, BF16])
def test_blocks_cover_all_rows_in_few_sizes(sizes: Sizes) -> None:
    block, grain = sizes
    for count in [*counts(sizes), *range(grain, 3 * grain)]:
        blocks = list(row_blocks(count, sizes))
        covered = {i for rows in blocks for i in range(rows.start, rows.stop)}
        assert sorted(covered) == [*range(count)]
        assert all(a.start < b.start and a.stop < b.stop for a, b in pairwise(blocks))
        lengths = [rows.stop - rows.start for rows in blocks]
        assert all(length % grain == 0 and length <= block for length in lengths)
        assert sum(lengths) < count + grain


@pytest.mark.parametrize(("dtype", "sizes", "limit", "count"), CASES)
def test_products_are_those_of_fp64(calls, dtype, sizes, limit, count: int) -> None:
    torch.manual_seed(count)
    a, b = drawn(dtype, count, 96), drawn(dtype, 96, 80)
    wanted = a.double() @ b.double()
    assert differ(product(a, b), wanted) < limit
    wide = torch.full((count, 200), 7.0, dtype=dtype)
    product(a, b.t().contiguous().t(), out=wide[:, 64:144])
    assert differ(wide[:, 64:144], wanted) < limit
    assert (wide[:, :64] == 7).all()
    assert (wide[:, 144:] == 7).all()
    turned = torch.empty(80, count, dtype=dtype)
    product(a, b, out=turned.t())
    assert differ(turned.t(), wanted) < limit
    assert calls


@pytest.mark.parametrize(("dtype", "sizes", "limit", "count"), CASES)
def test_columns_go_in_blocks_as_rows_do(calls, dtype, sizes, limit, count: int) -> None:
    """Into fp32, as the logits are."""
    torch.manual_seed(count)
    a, b_NK = drawn(dtype, 80, 96), drawn(dtype, count, 96)
    found = product_in_columns(a, padded(b_NK).t(), torch.empty(80, count))
    assert differ(found, a.double() @ b_NK.double().t()) < limit
    assert {columns % sizes.grain for _, _, columns in calls} == {0}


@pytest.mark.parametrize(("dtype", "sizes", "limit", "count"), CASES)
def test_sums_are_added_to_once(calls, dtype, sizes, limit, count: int) -> None:
    """Rows that two blocks compute are not added twice."""
    torch.manual_seed(count)
    a, b, start = drawn(dtype, count, 64), drawn(dtype, 64, 48), torch.randn(count, 48)
    found = add_product(start.clone(), a, b)
    assert differ(found, start.double() + a.double() @ b.double()) < limit
    turned = drawn(dtype, 64, count).t()
    wanted = start.double() + turned.double() @ b.double()
    assert differ(add_product(start.clone(), turned, b), wanted) < limit
    assert calls
    assert {rows % sizes.grain for rows, _, _ in calls} == {0}


@pytest.mark.parametrize(("dtype", "sizes", "limit", "count"), CASES)
def test_thin_products_are_added_in_the_sums_dtype(dtype, sizes, limit, count: int) -> None:
    """As one addmm does: each number is rounded once."""
    torch.manual_seed(count)
    a, b, start = drawn(dtype, count, 16), drawn(dtype, 16, 48), drawn(dtype, count, 48)
    found = add_thin_product(start.clone(), a, b)
    wanted = torch.addmm(start.double(), a.double(), b.double())
    assert found.dtype == dtype
    assert differ(found, wanted) < limit
    assert differ(found, wanted.to(dtype).double()) < (1e-3 if dtype == torch.bfloat16 else limit)


@pytest.mark.parametrize(("dtype", "sizes", "limit", "count"), CASES)
@pytest.mark.parametrize(("left", "right"), [(16, 80), (80, 16), (576, 544)])
def test_gradients_of_matrices_sum_over_all_tokens(
    calls, dtype, sizes, limit, count, left, right
) -> None:
    torch.manual_seed(count)
    a, b = drawn(dtype, count, left), drawn(dtype, count, right)
    found = summed_over_tokens(a, b)
    assert found.dtype == torch.float32
    assert differ(found, a.double().t() @ b.double()) < limit
    assert {rows for rows, _, _ in calls} == {min(left, right)}


@pytest.mark.parametrize(("dtype", "sizes"), [(torch.float32, FP32), (torch.bfloat16, BF16)])
def test_packs_of_many_lengths_make_products_of_few_sizes(calls, dtype, sizes) -> None:
    """oneDNN keeps a kernel for each size."""
    w = torch.randn(64, 32).to(dtype)
    for count in range(1, 1100):
        product(torch.zeros(count, 64, dtype=dtype), w)
        summed_over_tokens(torch.zeros(count, 16, dtype=dtype), torch.zeros(count, 64, dtype=dtype))
    most = sizes.block // sizes.grain
    assert len({rows for rows, _, columns in calls if columns == 32}) == most
    assert len({tokens for rows, tokens, _ in calls if rows == 16}) == most


def test_kernels_are_counted_for_bf16_by_the_sizes_there_are() -> None:
    assert kernel_bytes(torch.float32, 1000) == 0
    one = kernel_bytes(torch.bfloat16, 1)
    assert [kernel_bytes(torch.bfloat16, rows) / one for rows in (33, 256, 512, 4096)] == [
        2, 8, 16, 16,
    ]  # fmt: skip


def test_thin_products_of_many_lengths_are_of_few_sizes(monkeypatch) -> None:
    lengths = set()
    multiply = torch.Tensor.addmm_

    def listed(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        lengths.add(len(a))
        return multiply(total, a, b)

    monkeypatch.setattr(torch.Tensor, "addmm_", listed)
    b = torch.zeros(16, 64, dtype=torch.bfloat16)
    for count in range(1, 1100):
        a = torch.zeros(count, 16, dtype=torch.bfloat16)
        add_thin_product(torch.zeros(count, 64, dtype=torch.bfloat16), a, b)
    assert lengths == {*range(BF16.grain, BF16.block + 1, BF16.grain)}


@pytest.mark.parametrize(("dtype", "sizes", "limit"), KINDS)
def test_padding_makes_one_product_and_is_left_out(calls, dtype, sizes, limit) -> None:
    block, grain = sizes
    for count in [grain - 1, grain, grain + 1, 95, block - 1, block, block + 1]:
        calls.clear()
        torch.manual_seed(count)
        a, b = drawn(dtype, count, 64), drawn(dtype, 64, 40)
        wide = padded(a)
        inside = grain <= count <= block
        assert len(wide) == (-(-count // grain) * grain if inside else count)
        assert wide is a or count % grain
        found = product(wide, b, out=torch.empty(count, 40, dtype=dtype))
        assert differ(found, a.double() @ b.double()) < limit
        assert len(calls) == (0 if count < grain else 1 + (count > block))


def test_other_dtypes_are_torchs(calls) -> None:
    a, b = drawn(torch.float64, 300, 64), drawn(torch.float64, 64, 40)
    assert sizes_for(a) is None
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
