"""The Llama architecture, over a flat run of tokens.

Touvron et al. (2023), Dubey et al. (2024). Module and parameter names are those of
transformers' LlamaForCausalLM, so a Hugging Face state dict loads as it is.

T: tokens   V: vocabulary   E: hidden size   F: intermediate size
H: heads   K: key-value heads   D: head size   R: rows whose output is wanted
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
from llamaweft.model.replay import KEEPABLE, Segment, Tape, Tiling, recorded
from llamaweft.model.swiglu import swiglu
from llamaweft.model.task_heads import TaskHead
from llamaweft.weights.linear import Embedding, Linear
from llamaweft.weights.stream import Resident, Stream

Rope = tuple[Tensor, Tensor]
"""cos_TD and sin_TD."""

Rows = Tensor | None
"""Indices of the tokens whose output is wanted; None: all."""


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

    def forward(self, x_TE: Tensor, rope: Rope, attend: Attend, tape: Tape, rows: Rows) -> Tensor:
        cos_TD, sin_TD = rope
        q_RE = tape.product("q_proj", self.q_proj, x_TE if rows is None else x_TE[rows])
        k_TKD = tape.product("k_proj", self.k_proj, x_TE).unflatten(-1, (-1, self.head_dim))
        v_TKD = tape.product("v_proj", self.v_proj, x_TE).unflatten(-1, (-1, self.head_dim))
        q_RHD = q_RE.unflatten(-1, (-1, self.head_dim))
        at = slice(None) if rows is None else rows
        q_RHD = rotate(q_RHD, cos_TD[at], sin_TD[at])
        k_TKD = rotate(k_TKD, cos_TD, sin_TD)
        o_RHD = tape.attention(attend, self.layer, q_RHD, k_TKD, v_TKD)
        return tape.product("o_proj", self.o_proj, o_RHD.flatten(1))


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)) (SwiGLU: Shazeer, 2020)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x_TE: Tensor, tape: Tape) -> Tensor:
        gate_TF = tape.product("gate_proj", self.gate_proj, x_TE)
        up_TF = tape.product("up_proj", self.up_proj, x_TE)
        return tape.product("down_proj", self.down_proj, swiglu(gate_TF, up_TF))


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def attention_segment(
        self, x_TE: Tensor, rope: Rope, attend: Attend, tape: Tape, rows: Rows = None
    ) -> Tensor:
        """x + attention(norm(x)), for `rows` only where they are given."""
        mixed_RE = self.self_attn(self.input_layernorm(x_TE), rope, attend, tape, rows)
        return mixed_RE + (x_TE if rows is None else x_TE[rows])

    def mlp_segment(self, x_TE: Tensor, tape: Tape) -> Tensor:
        """x + mlp(norm(x))."""
        return self.mlp(self.post_attention_layernorm(x_TE), tape) + x_TE

    @property
    def trains_attention(self) -> bool:
        """Whether something in its first segment is trained."""
        parts = (*self.self_attn.parameters(), *self.input_layernorm.parameters())
        return any(p.requires_grad for p in parts)

    @property
    def draws_random_numbers(self) -> bool:
        """Whether an adapter in it drops inputs."""
        return self.training and any(getattr(m, "dropout", 0) > 0 for m in self.modules())


@dataclass(frozen=True)
class Memory:
    """What training keeps of each layer's forward pass: the resolved Schedule.

    keep: for each layer, names of replay.KEEPABLE. mlp_tile_tokens: rows of an MLP computed at
    once. loss_tile_labels: labels whose logits are held at once. keep_dtype: what kept outputs are
    held in; None: the compute dtype.
    """

    keep: list[frozenset[str]]
    mlp_tile_tokens: int = 1024
    loss_tile_labels: int = 256
    keep_dtype: torch.dtype | None = None

    @classmethod
    def all_kept(cls, layers: int) -> Memory:
        return cls([frozenset(KEEPABLE)] * layers)


class LlamaModel(nn.Module):
    """Token ids and positions in, the last hidden state out.

    neftune_noise_alpha: of the noise on embeddings in training (Jain et al., 2023). compute_dtype:
    dtype of activations and products. memory: what is kept for the backward pass.
    stream: brings the frozen weights of the next layer (weights/stream.py). tiling: where the
    backward pass is.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = torch.float32
        self.neftune_noise_alpha: float | None = None
        self.memory = Memory.all_kept(config.num_hidden_layers)
        self.stream: Stream = Resident()
        self.tiling = Tiling()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    @property
    def decoders(self) -> list[DecoderLayer]:
        """The layers, as what they are."""
        return cast(list[DecoderLayer], list(self.layers))

    def _begin(self, ids_T: Tensor, positions_T: Tensor) -> tuple[Tensor, Rope]:
        return self.embed_tokens(ids_T, self.compute_dtype), self._rope(positions_T)

    def _rope(self, positions_T: Tensor) -> Rope:
        frequency = rotary_frequencies(self.config).to(positions_T.device)
        cos_TD, sin_TD = rotary_tables(frequency, positions_T)
        return cos_TD.to(self.compute_dtype), sin_TD.to(self.compute_dtype)

    def forward(self, ids_T: Tensor, positions_T: Tensor, attend: Attend) -> Tensor:
        """h_TE of every token: for measuring and for answers. Keeps what autograd asks for."""
        x_TE, rope = self._begin(ids_T, positions_T)
        for index, layer in enumerate(self.decoders):
            self.stream.before(index, 1)
            x_TE = layer.attention_segment(x_TE, rope, attend, Tape())
            x_TE = layer.mlp_segment(x_TE, Tape())
        return self.norm(x_TE)

    @staticmethod
    def _noise(x_TE: Tensor, pack: Pack, alpha: float) -> Tensor:
        """Uniform within alpha / sqrt(L E) of 0, for each document of L tokens."""
        lengths_T = torch.tensor(pack.lengths, device=x_TE.device)[pack.segment_T]
        widest_T1 = alpha / (lengths_T * x_TE.shape[1]).float().sqrt()[:, None]
        return torch.empty_like(x_TE).uniform_(-1, 1) * widest_T1.to(x_TE.dtype)

    def train_forward(self, pack: Pack, rows_R: Tensor) -> Tensor:
        """h_RE of the rows that have a label, each layer in segments that keep what `memory` says.

        The last layer computes keys and values of all tokens, and the rest for `rows_R` only.
        Layers below the lowest trained one are not part of the backward pass.
        """
        x_TE, rope = self._begin(pack.ids_T, pack.positions_T)
        if self.neftune_noise_alpha is not None and self.training:
            x_TE = x_TE + self._noise(x_TE, pack, self.neftune_noise_alpha)
        attend, last = PackAttention(pack), len(self.layers) - 1
        for index, layer in enumerate(self.decoders):
            self.stream.before(index, 1)
            rows = rows_R if index == last else None
            if rows is not None:
                attend = PackAttention(pack, rows)
            trained = any(p.requires_grad for p in layer.parameters())
            if trained or x_TE.requires_grad:
                x_TE = self._recorded_layer(index, x_TE, rope, attend, rows)
            else:
                x_TE = layer.attention_segment(x_TE, rope, attend, Tape(), rows)
                x_TE = layer.mlp_segment(x_TE, Tape())
        return self.norm(x_TE)

    def first_layer(self, x_TE: Tensor, pack: Pack) -> Tensor:
        """h_TE after the first layer, as a step computes it: for measuring how long that takes."""
        rope, attend = self._rope(pack.positions_T), PackAttention(pack)
        return self._recorded_layer(0, x_TE, rope, attend, None)

    def _recorded_layer(
        self, index: int, x_TE: Tensor, rope: Rope, attend: Attend, rows: Rows
    ) -> Tensor:
        layer, keep = self.decoders[index], self.memory.keep[index]
        dtype, random = self.memory.keep_dtype, layer.draws_random_numbers

        def before() -> None:
            self.stream.before(index, -1)

        attention: Segment | None = None
        if x_TE.requires_grad or layer.trains_attention:
            attention = Segment(
                lambda x, tape: layer.attention_segment(x, rope, attend, tape, rows),
                keep,
                "o_proj",
                dtype=dtype,
                random=random,
            )
            x_TE = recorded(attention, x_TE, before)
        else:
            x_TE = layer.attention_segment(x_TE, rope, attend, Tape(), rows)
        mlp = Segment(
            layer.mlp_segment,
            keep,
            "down_proj",
            tile=self.memory.mlp_tile_tokens,
            source=None if "mid" in keep else attention,
            dtype=dtype,
            random=random,
            tiling=self.tiling,
        )
        return recorded(mlp, x_TE, before)


class LlamaForCausalLM(nn.Module):
    """The model with its head. Parameters are trained unless they are frozen by the loader.

    modules_to_save: peft's name for what an adapter folder holds whole."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.modules_to_save: tuple[str, ...] = ()
        self.model = LlamaModel(config)
        self.lm_head = CausalLMHead(config.hidden_size, config.vocab_size)
        self.tie_weights()

    def tie_weights(self) -> None:
        """One matrix for embedding and head, where the config says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.hold(self.model.embed_tokens.weight)

    @property
    def device(self) -> torch.device:
        return self.model.norm.weight.device

    @property
    def key_value_heads(self) -> int:
        """Those that this process computes: the config's, or where heads are shared out a part."""
        attention = self.model.decoders[0].self_attn
        features: int = attention.k_proj.out_features
        return features // attention.head_dim

    def hidden(self, pack: Pack) -> Tensor:
        """The last hidden state h_TE of a pack."""
        return self.model(pack.ids_T, pack.positions_T, PackAttention(pack))

    def loss(self, pack: Pack) -> tuple[Tensor, Tensor]:
        """Weighted sum of the cross-entropy over the pack's labels, in nats, and the sum of
        their weights. Divide once, over the global batch."""
        rows_R, place_N = pack.label_position_N.unique(return_inverse=True)
        hidden_NE = self.model.train_forward(pack, rows_R)[place_N]
        return self.lm_head.loss(hidden_NE, pack, self.model.memory.loss_tile_labels)

    @torch.no_grad()
    def sequence_losses(self, pack: Pack) -> list[tuple[float, float]]:
        """For each document that has labels: summed cross-entropy in nats, summed weight."""
        hidden_NE = self.hidden(pack)[pack.label_position_N]
        loss_N = self.lm_head.label_losses(hidden_NE, pack) * pack.label_weight_N
        sums = torch.bincount(pack.label_sequence_N, loss_N.double())
        weights = torch.bincount(pack.label_sequence_N, pack.label_weight_N.double())
        rows = zip(sums.tolist(), weights.tolist(), strict=True)
        return [(total, weight) for total, weight in rows if weight > 0]

    @torch.no_grad()
    def sequence_scores(self, pack: Pack) -> list[tuple[float, bool]]:
        """For each document, all of which have labels: their summed log-probability in nats, and
        whether each is the likeliest token there."""
        hidden_NE = self.hidden(pack)[pack.label_position_N]
        loss_N, hit_N = self.lm_head.likeliest(hidden_NE, pack)
        sums = torch.bincount(pack.label_sequence_N, loss_N.double())
        misses = torch.bincount(pack.label_sequence_N, (~hit_N).double())
        rows = zip(sums.tolist(), misses.tolist(), strict=True)
        return [(-total, missed == 0) for total, missed in rows]

    def forward(self, pack: Pack) -> Tensor:
        """Logits_TV of every position, in fp32: for comparing, not for training."""
        return self.lm_head(self.hidden(pack)).float()


class LlamaWithHead(nn.Module):
    """The model with a head of few outputs (task_heads.py), under the names that transformers has
    for both."""

    def __init__(self, causal: LlamaForCausalLM, head: TaskHead) -> None:
        super().__init__()
        self.config, self.head_config = causal.config, head.config
        self.modules_to_save: tuple[str, ...] = (head.config.name,)
        self._hold(causal.model)
        self.add_module(head.config.name, head)

    def _hold(self, model: LlamaModel) -> None:
        self.model = model

    @property
    def peft_task(self) -> str:
        return self.head_config.peft_task

    @property
    def head(self) -> TaskHead:
        return cast(TaskHead, getattr(self, self.head_config.name))

    @property
    def device(self) -> torch.device:
        return self.model.norm.weight.device

    def loss(self, pack: Pack) -> tuple[Tensor, Tensor]:
        """Weighted sum of the losses of the pack's labels, and the sum of their weights."""
        if self.head.reads_all:
            rows_R = torch.arange(pack.tokens, device=self.device)
            read = self.head(self.model.train_forward(pack, rows_R))
        else:
            rows_R, place_N = pack.label_position_N.unique(return_inverse=True)
            read = self.head(self.model.train_forward(pack, rows_R)[place_N])
        losses_N = self.head.label_losses(read, pack) * pack.label_weight_N
        return losses_N.sum(), pack.label_weight_N.sum()

    @torch.no_grad()
    def read(self, pack: Pack) -> list[tuple[Tensor, tuple[float, float]]]:
        """For each document: logits at its labels (logits_TC of its tokens where the head reads
        them all), and its summed loss with the weight."""
        hidden_TE = self.model(pack.ids_T, pack.positions_T, PackAttention(pack))
        whole = self.head.reads_all
        logits = self.head(hidden_TE if whole else hidden_TE[pack.label_position_N])
        losses_N = self.head.label_losses(logits, pack) * pack.label_weight_N
        found = []
        for document in range(int(pack.label_sequence_N.max()) + 1):
            own_N = pack.label_sequence_N == document
            at = pack.segment_T == document if whole else own_N  # without sharing, one segment each
            weight = float(pack.label_weight_N[own_N].sum())
            found.append((logits[at], (float(losses_N[own_N].sum()), weight)))
        return found

    def forward(self, pack: Pack) -> Tensor:
        """Logits_TC of every position, in fp32: for comparing, not for training."""
        return self.head(self.model(pack.ids_T, pack.positions_T, PackAttention(pack)))


class LlamaForQuestionAnswering(LlamaWithHead):
    """Where an answer begins and ends; transformers calls the model `transformer` here."""

    def _hold(self, model: LlamaModel) -> None:
        self.transformer = model

    @property
    def model(self) -> LlamaModel:  # type: ignore[override]
        return self.transformer


def with_head(causal: LlamaForCausalLM, head: TaskHead) -> LlamaWithHead:
    """The model of a causal one under another head."""
    answers = head.config.task == "question_answering"
    return LlamaForQuestionAnswering(causal, head) if answers else LlamaWithHead(causal, head)


Model = LlamaForCausalLM | LlamaWithHead


def empty_causal_lm(config: LlamaConfig) -> LlamaForCausalLM:
    """The modules without memory for their weights."""
    with torch.device("meta"):
        return LlamaForCausalLM(config)
