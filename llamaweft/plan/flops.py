"""How much arithmetic a step needs: base matmuls, counted from shapes.

A product of [m, k] and [k, n] is 2 m k n FLOPs. T: tokens   R: rows of the last layer with a label
"""

from __future__ import annotations

from llamaweft.model.presets import LlamaConfig


def layer_weights(config: LlamaConfig) -> int:
    """Elements of the matrices of one layer."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    attention = 2 * config.hidden_size * config.head_dim * (heads + kv_heads)
    return attention + 3 * config.hidden_size * config.intermediate_size


def key_value_weights(config: LlamaConfig) -> int:
    """Elements of one layer's key and value projections: what the last layer needs everywhere."""
    return 2 * config.hidden_size * config.head_dim * config.num_key_value_heads


def training_flops(
    config: LlamaConfig,
    computed_tokens: int,
    labels: int,
    *,
    frozen_base: bool,
    outputs: int | None = None,
) -> float:
    """FLOPs of the base matmuls that one step needs, and no more.

    Forward once, the gradient of the input once and, where the base is trained, the gradient of
    the weight once. The last layer counts for labelled rows, but for its keys and values; the head
    counts for labels. With a frozen base no gradient goes into the embeddings, so the lowest
    layer's queries, keys and values need none. Attention itself, adapters and recomputation do not
    count. All layers are taken as adapted. outputs: of the head; None: the vocabulary.
    """
    layers, tokens = config.num_hidden_layers, computed_tokens
    rows = min(labels, tokens)
    whole, keys = layer_weights(config), key_value_weights(config)
    forward = (layers - 1) * whole * tokens + keys * tokens + (whole - keys) * rows
    head = (outputs or config.vocab_size) * config.hidden_size * labels
    products = 2 if frozen_base else 3
    count = products * (forward + head)
    if frozen_base:
        lowest = keys + config.hidden_size * config.num_attention_heads * config.head_dim
        count -= lowest * tokens
    return 2.0 * count
