"""The shape of a Llama model: Hugging Face's config.json, read, checked and written.

No torch here: the planner and `--help` read shapes without loading it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from llamaweft.errors import UserError

ROPE_KEYS = {
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}
MAX_LAYERS = 4096
"""Far more than any model has; a file that claims more would be built for hours."""
# What would change the maths and is not built: the key, and the values that leave it unchanged.
UNCHANGED = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "attention_dropout": (0, None),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
}


@dataclass(frozen=True)
class LlamaConfig:
    """What a Llama model is, under the names of Hugging Face's config.json.

    The meaning of each field is that of transformers' LlamaConfig.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    """The base of the rotary frequencies."""
    rope_scaling: dict[str, Any] | None = None
    """None, or `rope_type` (`linear` or `llama3`) with the numbers that it needs."""
    max_position_embeddings: int = 8192
    tie_word_embeddings: bool = False
    """Whether the head is the embedding's matrix."""
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    """Every id that ends a text."""
    pad_token_id: int | None = None
    initializer_range: float = 0.02
    """Standard deviation of random weights."""
    head_dim: int = 0
    """Size of one head; 0 means hidden_size // num_attention_heads."""

    def __post_init__(self) -> None:
        if self.head_dim == 0:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)

    @property
    def stop_ids(self) -> list[int]:
        """`eos_token_id` as a list, which it may be, or a single id, or None."""
        ids = self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id]
        return [token for token in ids if token is not None]

    @classmethod
    def from_dict(cls, data: dict[str, Any], where: str) -> LlamaConfig:
        """Read a config.json, old (`rope_theta`, `rope_scaling`) or new (`rope_parameters`).

        `where` names the file in errors. A key that transformers lets be absent has its default:
        num_key_value_heads, head_dim, rope_theta (10000), tie_word_embeddings (false).

        Raises UserError for a missing or malformed key, another architecture, and everything that
        changes the maths and is not built.
        """
        if _required(data, "model_type", where) != "llama":
            raise UserError(
                f"{where}: model_type is {data['model_type']!r}, but only 'llama' is built: "
                "give a model of the Llama architecture."
            )
        for key, allowed in UNCHANGED.items():
            if data.get(key, allowed[0]) not in allowed:
                raise UserError(
                    f"{where}: {key} is {data[key]!r}, which is not built "
                    f"(only {allowed[0]!r} is): give a model without it."
                )
        heads = _integer(data, "num_attention_heads", where)
        hidden_size = _integer(data, "hidden_size", where)
        if data.get("head_dim") is None and hidden_size % heads:
            raise UserError(
                f"{where}: hidden_size {hidden_size} is not a multiple of "
                f"num_attention_heads {heads}: mend one of them or give head_dim."
            )
        kv_heads = _integer(data, "num_key_value_heads", where, default=heads)
        head_dim = _integer(data, "head_dim", where, default=hidden_size // heads)
        if heads % kv_heads:
            raise UserError(
                f"{where}: num_attention_heads {heads} is not a multiple of "
                f"num_key_value_heads {kv_heads}: mend one of them."
            )
        if head_dim % 2:
            raise UserError(
                f"{where}: head_dim {head_dim} is odd, but rotary positions turn pairs: "
                "give an even head_dim."
            )
        layers = _integer(data, "num_hidden_layers", where)
        if layers > MAX_LAYERS:
            raise UserError(
                f"{where}: num_hidden_layers is {layers}, but no more than {MAX_LAYERS} are built: "
                "take the model's own config."
            )
        rope_theta, rope_scaling = _rope(data, where)
        return cls(
            vocab_size=_integer(data, "vocab_size", where),
            hidden_size=hidden_size,
            intermediate_size=_integer(data, "intermediate_size", where),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            rms_norm_eps=_number(data, "rms_norm_eps", where),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            max_position_embeddings=_integer(data, "max_position_embeddings", where),
            tie_word_embeddings=bool(data.get("tie_word_embeddings", False)),
            bos_token_id=data.get("bos_token_id"),
            eos_token_id=data.get("eos_token_id"),
            pad_token_id=data.get("pad_token_id"),
            initializer_range=_number(data, "initializer_range", where, default=0.02),
            head_dim=head_dim,
        )

    def to_dict(self) -> dict[str, Any]:
        """A config.json. The rotary embedding stands in it twice, `rope_theta` and `rope_scaling`
        for transformers 4, `rope_parameters` for transformers 5, so that both open it."""
        scaling = self.rope_scaling
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "attention_dropout": 0.0,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": dict(scaling) if scaling else None,
            "rope_parameters": {
                "rope_theta": self.rope_theta,
                **(scaling or {"rope_type": "default"}),
            },
            "max_position_embeddings": self.max_position_embeddings,
            "tie_word_embeddings": self.tie_word_embeddings,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id,
            "pad_token_id": self.pad_token_id,
            "initializer_range": self.initializer_range,
        }


def parameter_count(config: LlamaConfig) -> int:
    """How many numbers the model holds; a tied head counts once."""
    hidden = config.hidden_size
    attention = (
        2 * hidden * config.head_dim * (config.num_attention_heads + config.num_key_value_heads)
    )
    layer = attention + 3 * hidden * config.intermediate_size + 2 * hidden
    embeddings = config.vocab_size * hidden * (1 if config.tie_word_embeddings else 2)
    return embeddings + config.num_hidden_layers * layer + hidden


def _required(data: dict[str, Any], key: str, where: str) -> Any:
    if data.get(key) is None:
        raise UserError(f"{where}: the key {key} is missing: take the model's own config.json.")
    return data[key]


def _integer(data: dict[str, Any], key: str, where: str, default: int | None = None) -> int:
    if data.get(key) is None and default is not None:
        return default
    value = _required(data, key, where)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
        raise UserError(
            f"{where}: {key} is {str(value)[:80]!r}, but must be a whole number above zero."
        )
    return value


def _number(data: dict[str, Any], key: str, where: str, default: float | None = None) -> float:
    if data.get(key) is None and default is not None:
        return default
    value = _required(data, key, where)
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    if not plain or not math.isfinite(value) or not 0 < value < 1e12:
        raise UserError(f"{where}: {key} is {str(value)[:80]!r}, but must be a number above zero.")
    return float(value)


def _rope(data: dict[str, Any], where: str) -> tuple[float, dict[str, Any] | None]:
    """rope_theta and rope_scaling, from whichever keys hold them.

    Where both kinds stand in one file, `rope_scaling` wins over `rope_parameters` and the theta
    inside the winner over the one outside, as in transformers 5 (modeling_rope_utils).
    """
    block = data.get("rope_scaling") or data.get("rope_parameters") or {}
    if not isinstance(block, dict):
        raise UserError(f"{where}: the rope keys hold {block!r}, but must hold a mapping.")
    if block.get("partial_rotary_factor") not in (1, None):
        raise UserError(
            f"{where}: partial_rotary_factor is {block['partial_rotary_factor']!r}, which is not "
            "built: give a model without it."
        )
    outside = _number(data, "rope_theta", where, default=10000.0)
    theta = _number(block, "rope_theta", where, default=outside)
    kind = block.get("rope_type", block.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind not in ROPE_KEYS:
        raise UserError(
            f"{where}: rope type {kind!r} is not built (default, linear and llama3 are): "
            "give a model with one of these."
        )
    numbers = {key: _number(block, key, where) for key in ROPE_KEYS[kind]}
    if kind == "llama3":
        context = int(numbers["original_max_position_embeddings"])
        return theta, {"rope_type": kind, **numbers, "original_max_position_embeddings": context}
    return theta, {"rope_type": kind, **numbers}


def llama3_scaling(factor: float) -> dict[str, Any]:
    """Llama 3.1's scaling of the rotary frequencies, as config.json writes it."""
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


PRESETS = {
    "llama3-8b": LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        rope_theta=500000.0,
        max_position_embeddings=8192,
        bos_token_id=128000,
        eos_token_id=[128001, 128009],
    ),
    "llama3-70b": LlamaConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        rope_theta=500000.0,
        max_position_embeddings=8192,
        bos_token_id=128000,
        eos_token_id=[128001, 128009],
    ),
    "llama3.1-8b": LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        rope_theta=500000.0,
        rope_scaling=llama3_scaling(8.0),
        max_position_embeddings=131072,
        bos_token_id=128000,
        eos_token_id=[128001, 128008, 128009],
    ),
    "llama3.2-1b": LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        rope_theta=500000.0,
        rope_scaling=llama3_scaling(32.0),
        max_position_embeddings=131072,
        tie_word_embeddings=True,
        bos_token_id=128000,
        eos_token_id=[128001, 128008, 128009],
    ),
    "llama3.2-3b": LlamaConfig(
        vocab_size=128256,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        rope_theta=500000.0,
        rope_scaling=llama3_scaling(32.0),
        max_position_embeddings=131072,
        tie_word_embeddings=True,
        bos_token_id=128000,
        eos_token_id=[128001, 128008, 128009],
    ),
    # For tests: `dataclasses.replace` sets the tokenizer's vocabulary.
    "tiny": LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
    ),
}
