"""How much arithmetic a step needs: base matmuls, counted from shapes.

A product of [m, k] and [k, n] is 2 m k n FLOPs. T: tokens   R: rows of the last layer with a label
"""

from __future__ import annotations

from llamaweft.model.presets import LlamaConfig
from llamaweft.plan.shapes import OF_ALL_TOKENS, linear_weights
from llamaweft.plan.whole import Whole

INTO_ATTENTION = ("q_proj", "k_proj", "v_proj")


def training_flops(
    config: LlamaConfig,
    computed_tokens: int,
    labels: int,
    *,
    frozen_base: bool,
    outputs: int | None = None,
    whole: Whole = Whole(),  # noqa: B008 (frozen)
) -> float:
    """FLOPs of the base matmuls that one step needs, and no more.

    Forward once, the gradient of the input once and, where the base is trained, the gradient of
    the weight once. The last layer counts for labelled rows, but for its keys and values; the head
    counts for labels. With a frozen base no gradient goes into the embeddings, so the lowest
    layer's queries, keys and values need none. Attention itself, adapters and recomputation do not
    count. whole: what is trained whole beside a frozen base, and where the backward pass ends;
    left out, all layers are adapted. outputs: of the head; None: the vocabulary.
    """
    layers, tokens = range(config.num_hidden_layers), computed_tokens
    forward = sum(_layer(config, i, tokens, labels) for i in layers)
    width = config.vocab_size if outputs is None else outputs
    head = width * config.hidden_size * labels
    if not frozen_base:
        return 2.0 * 3 * (forward + head)
    count = forward + head + head * whole.below_head + head * whole.head
    count += sum(_layer(config, i, tokens, labels) for i in layers[whole.lowest :])
    if not whole.embedding and whole.lowest < len(layers):
        first = (_products(config, whole.lowest, tokens, labels)[n] for n in INTO_ATTENTION)
        count -= sum(first)
    count += sum(_products(config, i, tokens, labels)[name] for i, name in whole.linears)
    return 2.0 * count


def middle_layer_flops(config: LlamaConfig, computed_tokens: int, *, frozen_base: bool) -> float:
    """FLOPs of the base matmuls of a layer that is neither the first nor the last, in one step."""
    return 2.0 * (2 if frozen_base else 3) * computed_tokens * sum(linear_weights(config).values())


def layer_flops(config: LlamaConfig, computed_tokens: int, labels: int) -> float:
    """FLOPs of the base matmuls of all layers in one forward pass."""
    layers = range(config.num_hidden_layers)
    return 2.0 * sum(_layer(config, i, computed_tokens, labels) for i in layers)


def _layer(config: LlamaConfig, layer: int, tokens: int, labels: int) -> int:
    return sum(_products(config, layer, tokens, labels).values())


def _products(config: LlamaConfig, layer: int, tokens: int, labels: int) -> dict[str, int]:
    """Multiplications of each product of a layer."""
    last = layer == config.num_hidden_layers - 1
    rows = min(labels, tokens) if last else tokens
    return {
        name: numbers * (tokens if name in OF_ALL_TOKENS else rows)
        for name, numbers in linear_weights(config).items()
    }
