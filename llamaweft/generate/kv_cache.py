"""The key-value cache of a batch of sequences, and attention to it.

B: sequences   S: room for positions   T: tokens of a pack   H: heads   K: key-value heads
D: head size
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llamaweft.model.attention import PackAttention
from llamaweft.model.pack import Pack
from llamaweft.model.presets import LlamaConfig


class KVCache:
    """Keys and values of every layer, [B, K, S, D], and how many positions each row holds.

    key_value_heads: those that are computed here (`LlamaForCausalLM.key_value_heads`)."""

    def __init__(
        self,
        config: LlamaConfig,
        key_value_heads: int,
        batch: int,
        room: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (batch, key_value_heads, room, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        self.used_B = torch.zeros(batch, dtype=torch.int64, device=device)

    def keep(self, rows: Tensor) -> None:
        """Drop all sequences but `rows` (indices into B)."""
        self.keys = [k[rows] for k in self.keys]
        self.values = [v[rows] for v in self.values]
        self.used_B = self.used_B[rows]

    def bytes(self) -> int:
        return sum(t.nbytes for t in [*self.keys, *self.values])


class Prefill:
    """Attention of new tokens to themselves and to what the cache holds, kept in the cache.

    Document b of the pack continues row first + b; places[b]: where its tokens stand in the pack.
    With empty rows this is the pack's own attention; a filled one (the next turn of a chat) comes
    alone.
    """

    def __init__(self, cache: KVCache, pack: Pack, places: list[Tensor], first: int = 0) -> None:
        self.cache, self.places = cache, places
        self.rows = slice(first, first + len(places))
        self.fresh = PackAttention(pack)
        self.before = int(cache.used_B[self.rows].max())
        assert self.before == 0 or len(places) == 1

    def __call__(self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        keys, values = (held[layer][self.rows] for held in (self.cache.keys, self.cache.values))
        for row, of_row in enumerate(self.places):
            place = slice(self.before, self.before + len(of_row))
            keys[row, :, place] = k_TKD[of_row].transpose(0, 1)
            values[row, :, place] = v_TKD[of_row].transpose(0, 1)
        if self.before == 0:
            return self.fresh(layer, q_THD, k_TKD, v_TKD)
        end = self.before + len(q_THD)
        seen_LJ = torch.ones(len(q_THD), end, dtype=torch.bool, device=q_THD.device)
        o_HLD = F.scaled_dot_product_attention(
            q_THD.transpose(0, 1)[None],
            keys[:, :, :end],
            values[:, :, :end],
            attn_mask=seen_LJ.tril(self.before),
            enable_gqa=True,
        )
        return o_HLD[0].transpose(0, 1)

    def finish(self) -> None:
        lengths = [len(of_row) for of_row in self.places]
        fresh_B = torch.tensor(lengths, device=self.cache.used_B.device)
        self.cache.used_B[self.rows] += fresh_B


class Decode:
    """Attention of one new token for each row to all that its row holds, itself included."""

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache
        self.rows_B = torch.arange(len(cache.used_B), device=cache.used_B.device)
        self.end = int(cache.used_B.max()) + 1
        places_S = torch.arange(self.end, device=cache.used_B.device)
        self.seen_B11S = (places_S <= cache.used_B[:, None])[:, None, None, :]

    def __call__(self, layer: int, q_BHD: Tensor, k_BKD: Tensor, v_BKD: Tensor) -> Tensor:
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys[self.rows_B, :, self.cache.used_B] = k_BKD
        values[self.rows_B, :, self.cache.used_B] = v_BKD
        o_BH1D = F.scaled_dot_product_attention(
            q_BHD[:, :, None],
            keys[:, :, : self.end],
            values[:, :, : self.end],
            attn_mask=self.seen_B11S,
            enable_gqa=True,
        )
        return o_BH1D.squeeze(2)

    def finish(self) -> None:
        self.cache.used_B += 1
