"""The Llama architecture, over a flat run of tokens.

Touvron et al. (2023), Dubey et al. (2024). Module and parameter names are those of
transformers' LlamaForCausalLM, so a Hugging Face state dict loads as it is.

T: tokens   V: vocabulary   E: hidden size   F: intermediate size
H: heads   K: key-value heads   D: head size
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llamaweft.model.attention import (
    Attend,
    PackAttention,
    rotary_frequencies,
    rotary_tables,
    rotate,
)
from llamaweft.model.heads import CausalLMHead
from llamaweft.model.pack import Pack
from llamaweft.model.presets import LlamaConfig
from llamaweft.weights.linear import Linear


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in fp32 (Zhang & Sennrich, 2019)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x_TE: Tensor) -> Tensor:
        normed_TE = F.rms_norm(x_TE.float(), x_TE.shape[-1:], self.weight.float(), self.eps)
        return normed_TE.to(x_TE.dtype)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = Linear(config.hidden_size, heads * config.head_dim)
        self.k_proj = Linear(config.hidden_size, kv_heads * config.head_dim)
        self.v_proj = Linear(config.hidden_size, kv_heads * config.head_dim)
        self.o_proj = Linear(heads * config.head_dim, config.hidden_size)

    def forward(self, x_TE: Tensor, cos_TD: Tensor, sin_TD: Tensor, attend: Attend) -> Tensor:
        q_THD = self.q_proj(x_TE).unflatten(-1, (-1, self.head_dim))
        k_TKD = self.k_proj(x_TE).unflatten(-1, (-1, self.head_dim))
        v_TKD = self.v_proj(x_TE).unflatten(-1, (-1, self.head_dim))
        q_THD, k_TKD = rotate(q_THD, cos_TD, sin_TD), rotate(k_TKD, cos_TD, sin_TD)
        return self.o_proj(attend(self.layer, q_THD, k_TKD, v_TKD).flatten(1))


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)) (SwiGLU: Shazeer, 2020)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x_TE: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_TE)) * self.up_proj(x_TE))


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x_TE: Tensor, cos_TD: Tensor, sin_TD: Tensor, attend: Attend) -> Tensor:
        x_TE = x_TE + self.self_attn(self.input_layernorm(x_TE), cos_TD, sin_TD, attend)
        return x_TE + self.mlp(self.post_attention_layernorm(x_TE))


class LlamaModel(nn.Module):
    """Token ids and positions in, the last hidden state out.

    `compute_dtype`: dtype of activations and products.
    `recompute_layers`: the first so many layers keep only their input for the backward pass and
    compute the rest again; the numbers are the same.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = torch.float32
        self.recompute_layers = 0
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, ids_T: Tensor, positions_T: Tensor, attend: Attend) -> Tensor:
        frequency = rotary_frequencies(self.config).to(ids_T.device)
        cos_TD, sin_TD = (
            table.to(self.compute_dtype) for table in rotary_tables(frequency, positions_T)
        )
        x_TE = self.embed_tokens(ids_T).to(self.compute_dtype)
        for index, layer in enumerate(self.layers):
            if index < self.recompute_layers and torch.is_grad_enabled():
                x_TE = checkpoint(layer, x_TE, cos_TD, sin_TD, attend, use_reentrant=False)
            else:
                x_TE = layer(x_TE, cos_TD, sin_TD, attend)
        return self.norm(x_TE)


class LlamaForCausalLM(nn.Module):
    """The model with its head. Parameters are trained unless they are frozen by the loader."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = LlamaModel(config)
        self.lm_head = CausalLMHead(config.hidden_size, config.vocab_size)
        self.tie_weights()

    def tie_weights(self) -> None:
        """One matrix for embedding and head, where the config says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = cast(nn.Parameter, self.model.embed_tokens.weight)

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    def hidden(self, pack: Pack) -> Tensor:
        """The last hidden state h_TE of a pack."""
        return self.model(pack.ids_T, pack.positions_T, PackAttention(pack))

    def loss(self, pack: Pack) -> tuple[Tensor, Tensor]:
        """Weighted sum of the cross-entropy over the pack's labels, in nats, and the sum of
        their weights. Divide once, over the global batch."""
        return self.lm_head.loss(self.hidden(pack), pack)

    @torch.no_grad()
    def sequence_losses(self, pack: Pack) -> list[tuple[float, float]]:
        """For each document that has labels: summed cross-entropy in nats, summed weight."""
        loss_N = self.lm_head.label_losses(self.hidden(pack), pack) * pack.label_weight_N
        sums = torch.bincount(pack.label_sequence_N, loss_N.double())
        weights = torch.bincount(pack.label_sequence_N, pack.label_weight_N.double())
        rows = zip(sums.tolist(), weights.tolist(), strict=True)
        return [(total, weight) for total, weight in rows if weight > 0]

    def forward(self, pack: Pack) -> Tensor:
        """Logits_TV of every position, in fp32: for comparing, not for training."""
        return self.lm_head(self.hidden(pack)).float()
