"""How much arithmetic a model needs: base matmuls, counted from shapes.

A product of [m, k] and [k, n] is 2 m k n FLOPs. T: tokens.
"""

from __future__ import annotations

from llamaweft.model.presets import LlamaConfig


def layer_weights(config: LlamaConfig) -> int:
    """Elements of the matrices of one layer."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    attention = 2 * config.hidden_size * config.head_dim * (heads + kv_heads)
    return attention + 3 * config.hidden_size * config.intermediate_size


def training_flops(
    config: LlamaConfig, computed_tokens: int, labels: int, *, frozen_base: bool
) -> float:
    """FLOPs of the base matmuls of one step: forward once, the gradient of the input once and,
    where the base is trained, the gradient of the weight once. The head counts on labels only;
    attention itself, adapters and recomputation do not count."""
    products = 2 if frozen_base else 3
    layers = config.num_hidden_layers * layer_weights(config) * computed_tokens
    head = config.vocab_size * config.hidden_size * labels
    return 2.0 * products * (layers + head)
