"""The widths of a layer and the shapes of its matrices, by name."""

from __future__ import annotations

from llamaweft.model.presets import LlamaConfig

LINEARS = {
    "q_proj": ("hidden", "queries"),
    "k_proj": ("hidden", "keys"),
    "v_proj": ("hidden", "keys"),
    "o_proj": ("queries", "hidden"),
    "gate_proj": ("hidden", "inner"),
    "up_proj": ("hidden", "inner"),
    "down_proj": ("inner", "hidden"),
}
"""Input and output of each linear layer."""

MLP = ("gate_proj", "up_proj", "down_proj")

OF_ALL_TOKENS = ("k_proj", "v_proj")
"""What the last layer computes for every token."""


def sizes(config: LlamaConfig) -> dict[str, int]:
    """The widths of a layer by name."""
    return {
        "hidden": config.hidden_size,
        "inner": config.intermediate_size,
        "queries": config.num_attention_heads * config.head_dim,
        "keys": config.num_key_value_heads * config.head_dim,
    }


def linear_weights(config: LlamaConfig) -> dict[str, int]:
    """Numbers of each matrix of a layer."""
    size = sizes(config)
    return {name: size[of] * size[out] for name, (of, out) in LINEARS.items()}
