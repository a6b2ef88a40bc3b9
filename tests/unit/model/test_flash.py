"""Attention of pieces: against plain masked attention, forward and gradients."""

from __future__ import annotations

import pytest
import torch

from llamaweft.model import flash
from llamaweft.model.attention import PackAttention
from llamaweft.model.flash import attend_by_masks
from llamaweft.model.pack import Pack

HEADS, KV_HEADS, SIZE = 4, 2, 16


def pack(lengths: list[int], parents: list[int]) -> Pack:
    tokens = sum(lengths)
    nothing = torch.zeros(0, dtype=torch.int64)
    return Pack(
        ids_T=torch.zeros(tokens, dtype=torch.int64),
        positions_T=torch.arange(tokens),
        segment_T=torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
        parent_S=torch.tensor(parents),
        label_position_N=nothing,
        label_target_N=nothing,
        label_weight_N=nothing.float(),
        label_sequence_N=nothing,
        document_tokens=tokens,
    )


CASES = {
    "documents": ([5, 200, 33], [-1, -1, -1], None),
    "a shared prefix": ([70, 40, 90], [-1, 0, 0], None),
    "two levels": ([20, 30, 25, 10], [-1, 0, 1, 0], None),
    "some rows": ([50, 200], [-1, -1], [3, 4, 5, 49, 50, 51, 150, 249]),
    "some rows after a prefix": ([40, 60, 30], [-1, 0, 0], [41, 42, 70, 100, 129]),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("key_block", [16, 2048])
def test_it_is_masked_attention(case: str, key_block: int, monkeypatch) -> None:
    """1e-5 of the norm: sums in fp32 in another order."""
    monkeypatch.setattr(flash, "KEY_BLOCK", key_block)
    lengths, parents, rows = CASES[case]
    made = pack(lengths, parents)
    torch.manual_seed(2)
    tokens = sum(lengths)
    queries = tokens if rows is None else len(rows)
    tensors = [
        torch.randn(queries, HEADS, SIZE),
        torch.randn(tokens, KV_HEADS, SIZE),
        torch.randn(tokens, KV_HEADS, SIZE),
    ]
    attend = PackAttention(made, None if rows is None else torch.tensor(rows))
    grads = []
    for function in (
        lambda *qkv: attend(0, *qkv),
        lambda *qkv: attend_by_masks(*qkv, attend.pieces),
    ):
        leaves = [t.clone().requires_grad_() for t in tensors]
        out = function(*leaves)
        torch.manual_seed(3)
        out.backward(torch.randn(out.shape))
        grads.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for ours, theirs in zip(*grads, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-5


def test_masks_are_written_out_by_hand_for_one_case() -> None:
    """attend_by_masks itself, against softmax over the keys that are listed."""
    attend = PackAttention(pack([3, 2, 2], [-1, 0, -1]))
    torch.manual_seed(4)
    q, k, v = torch.randn(7, 1, 8), torch.randn(7, 1, 8), torch.randn(7, 1, 8)
    seen = [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4], [5], [5, 6]]
    for row, keys in enumerate(seen):
        weights = (q[row, 0] @ k[keys, 0].t() / 8**0.5).softmax(0)
        found = attend_by_masks(q, k, v, attend.pieces)[row, 0]
        torch.testing.assert_close(found, weights @ v[keys, 0])


@pytest.mark.parametrize("few", [0, 256], ids=["torch's kernel", "fp32 blocks"])
def test_bf16_stays_close(few: int, monkeypatch) -> None:
    monkeypatch.setattr(flash, "FEW_QUERIES", few)
    made = pack([30, 40], [-1, 0])
    attend = PackAttention(made)
    torch.manual_seed(5)
    tensors = [torch.randn(70, n, SIZE) for n in (HEADS, KV_HEADS, KV_HEADS)]
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        leaves = [t.detach().to(dtype).clone().requires_grad_() for t in tensors]
        out = attend(0, *leaves)
        out.backward(torch.ones_like(out))
        found.append([out.detach().float(), *(leaf.grad.float() for leaf in leaves)])
    for exact, rounded in zip(*found, strict=True):
        assert float((exact - rounded).norm() / exact.norm()) < 3e-2
