"""Exact attention of pieces of a pack, in memory linear in their length.

A piece is a run of queries with the keys that they see: ranges before them, whole, and their own
range, causally. Each range is one call of flash attention (Dao et al., 2022); several are joined by
their log-normalisers, so there is no mask.

R: queries   T: keys   L, J: queries and keys of one call   H: heads   K: key-value heads
G: heads of a key-value head, H / K   D: head size
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

QUERY_BLOCK, KEY_BLOCK = 64, 2048
"""Scores that the backward pass holds at once, for each head."""

FEW_QUERIES = 256
"""Queries of a piece up to which its backward pass runs in fp32, in any dtype (docs/log.md)."""

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Piece:
    """queries: rows of q and o. before: key ranges seen whole. own: the keys of the queries
    themselves, each seen by its query and later ones."""

    queries: slice
    before: list[slice]
    own: slice

    @property
    def ranges(self) -> list[tuple[slice, bool]]:
        """(keys, whether causally)."""
        return [*((keys, False) for keys in self.before), (self.own, True)]


def _by_head(x_LHD: Tensor, kv_heads: int) -> Tensor:
    """[L, H, D] as [K, G, L, D], a view."""
    return x_LHD.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)


def _expanded(x_JKD: Tensor, groups: int) -> Tensor:
    """[J, K, D] as [K, G, J, D], a view in which the heads of a group share their keys."""
    return x_JKD.transpose(0, 1)[:, None].expand(-1, groups, -1, -1)


def flash_forward(
    q_RHD: Tensor, k_TKD: Tensor, v_TKD: Tensor, pieces: list[Piece]
) -> tuple[Tensor, list[Tensor]]:
    """softmax(q k^T / sqrt(D)) v on a CPU: o_RHD, and each piece's log-normaliser [K, G, L]."""
    kv_heads = k_TKD.shape[1]
    groups = q_RHD.shape[1] // kv_heads
    o_RHD = torch.empty_like(q_RHD)
    normalisers = []
    for piece in pieces:
        q = _by_head(q_RHD[piece.queries], kv_heads)
        parts = [
            _forward(q, _expanded(k_TKD[keys], groups), _expanded(v_TKD[keys], groups), 0.0, causal)
            for keys, causal in piece.ranges
        ]
        out, normaliser = parts[0]
        if len(parts) > 1:
            normaliser = torch.logsumexp(torch.stack([lse for _, lse in parts]), dim=0)
            shares = [(o, (lse - normaliser).exp()[..., None]) for o, lse in parts]
            out = torch.stack([o.float() * share for o, share in shares]).sum(0)
        _by_head(o_RHD[piece.queries], kv_heads).copy_(out)
        normalisers.append(normaliser)
    return o_RHD, normalisers


def attention_backward(
    g_RHD: Tensor,
    q_RHD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    o_RHD: Tensor,
    normalisers: list[Tensor],
    pieces: list[Piece],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v.

    With P the probabilities and delta = sum_D g o:  dv = P^T g,  dS = P (g v^T - delta),
    dq = dS k / sqrt(D),  dk = dS^T q / sqrt(D). P follows from the normaliser over all ranges, so
    each range adds its own part.
    """
    kv_heads = k_TKD.shape[1]
    dtype = q_RHD.dtype
    sums = [torch.zeros_like(x, dtype=torch.float32) for x in (q_RHD, k_TKD, v_TKD)]
    for piece, normaliser in zip(pieces, normalisers, strict=True):
        count = piece.queries.stop - piece.queries.start
        # Blocks of fp32 products are faster than torch's own kernel, in fp32 as for few queries.
        blocked = dtype == torch.float32 or count <= FEW_QUERIES
        held = torch.float32 if blocked else dtype
        q, g, o, dq = (_by_head(x[piece.queries], kv_heads) for x in (q_RHD, g_RHD, o_RHD, sums[0]))
        q, g, o = (x.to(held) for x in (q, g, o))
        for keys, causal in piece.ranges:
            k, v = (x[keys].transpose(0, 1).to(held) for x in (k_TKD, v_TKD))
            dk, dv = (x[keys].transpose(0, 1) for x in sums[1:])
            ranged = _blocked if blocked else _flash_range
            ranged(g, q, k, v, o, normaliser, causal, dq, dk, dv)
    dq_RHD, dk_TKD, dv_TKD = (x.to(dtype) for x in sums)
    return dq_RHD, dk_TKD, dv_TKD


def _flash_range(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, normaliser: Tensor, causal: bool,
    dq: Tensor, dk: Tensor, dv: Tensor,
) -> None:  # fmt: skip
    """Add the gradients of one range with torch's kernel. q: [K, G, L, D]; k: [K, J, D]."""
    groups = q.shape[1]
    wide_k, wide_v = (x[:, None].expand(-1, groups, -1, -1) for x in (k, v))
    found = _backward(g, q, wide_k, wide_v, o, normaliser, 0.0, causal)
    dq += found[0]
    dk += found[1].sum(1)
    dv += found[2].sum(1)


def _blocked(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, normaliser: Tensor, causal: bool,
    dq: Tensor, dk: Tensor, dv: Tensor,
) -> None:  # fmt: skip
    """Add the gradients of one range, block by block of queries and keys."""
    kv_heads, groups, queries, size = q.shape
    scale = 1 / math.sqrt(size)
    delta = (g * o).sum(-1, keepdim=True)
    # Few keys, as a short prefix has, are seen by many queries at once: as many scores.
    step = QUERY_BLOCK if causal else max(QUERY_BLOCK, QUERY_BLOCK * KEY_BLOCK // k.shape[1])
    for first in range(0, queries, step):
        rows = slice(first, min(first + step, queries))
        count = rows.stop - first
        q_b = (q[:, :, rows] * scale).reshape(kv_heads, groups * count, size)
        g_b = g[:, :, rows].reshape(kv_heads, groups * count, size)
        end = rows.stop if causal else k.shape[1]
        for start in range(0, end, KEY_BLOCK):
            keys = slice(start, min(start + KEY_BLOCK, end))
            p = torch.bmm(q_b, k[:, keys].transpose(1, 2)).unflatten(1, (groups, count))
            p.sub_(normaliser[:, :, rows, None]).exp_()
            if causal and keys.stop > first:
                p.tril_(first - start)
            p = p.flatten(1, 2)
            dv[:, keys].baddbmm_(p.transpose(1, 2), g_b)
            ds = torch.bmm(g_b, v[:, keys].transpose(1, 2))
            ds.sub_(delta[:, :, rows].reshape(kv_heads, -1, 1)).mul_(p)
            dq[:, :, rows] += torch.bmm(ds, k[:, keys]).mul_(scale).unflatten(1, (groups, count))
            dk[:, keys].baddbmm_(ds.transpose(1, 2), q_b)


def attend_on_cuda(q_RHD: Tensor, k_TKD: Tensor, v_TKD: Tensor, pieces: list[Piece]) -> Tensor:
    """All pieces in one call of variable-length attention (torch's, or flash-attn where it is
    installed), or piece by piece where the dtype or the GPU does not allow it."""
    major = torch.cuda.get_device_capability(q_RHD.device)[0]
    if q_RHD.dtype == torch.float32 or major < 8:
        return attend_by_masks(q_RHD, k_TKD, v_TKD, pieces)
    spans = [[*piece.before, piece.own] for piece in pieces]
    index_J = torch.cat([torch.arange(s.start, s.stop) for span in spans for s in span])
    index_J = index_J.to(q_RHD.device)
    queries = [piece.queries.stop - piece.queries.start for piece in pieces]
    keys = [sum(s.stop - s.start for s in span) for span in spans]
    edges_q, edges_k = (
        torch.tensor([0, *n], device=q_RHD.device).cumsum(0).int() for n in (queries, keys)
    )
    longest_q, longest_k = max(queries), max(keys)
    k_JKD, v_JKD = k_TKD[index_J], v_TKD[index_J]
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        from torch.nn.attention.varlen import varlen_attn

        # A window of (-1, 0) is causal, aligned at the last query and the last key.
        return varlen_attn(  # type: ignore[return-value]
            q_RHD, k_JKD, v_JKD, edges_q, edges_k, longest_q, longest_k,
            window_size=(-1, 0), enable_gqa=True,
        )  # fmt: skip
    return flash_attn_varlen_func(
        q_RHD, k_JKD, v_JKD, edges_q, edges_k, longest_q, longest_k, causal=True
    )


def attend_by_masks(q_RHD: Tensor, k_TKD: Tensor, v_TKD: Tensor, pieces: list[Piece]) -> Tensor:
    """The same by scaled_dot_product_attention, one call and one [L, J] mask a piece."""
    outputs = []
    for piece in pieces:
        ranges = [*piece.before, piece.own]
        k, v = (torch.cat([x[r] for r in ranges]).transpose(0, 1)[None] for x in (k_TKD, v_TKD))
        q = q_RHD[piece.queries].transpose(0, 1)[None]
        seen_LJ = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
        seen_LJ = seen_LJ.tril(k.shape[2] - q.shape[2])
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=seen_LJ, enable_gqa=True)
        outputs.append(o[0].transpose(0, 1))
    return torch.cat(outputs)
