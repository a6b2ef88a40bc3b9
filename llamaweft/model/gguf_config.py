"""What a GGUF file of the Llama architecture says about its model.

Keys and meanings: llama.cpp's GGUF specification and convert_hf_to_gguf.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader

from llamaweft.errors import UserError
from llamaweft.model.presets import LlamaConfig


def gguf_config(reader: GGUFReader, path: Path) -> LlamaConfig:
    """The shape, from the metadata and the tensors that are there.

    Raises UserError for another architecture, a missing key and whatever is not built.
    """
    architecture = _field(reader, "general.architecture")
    if architecture != "llama":
        raise UserError(
            f"{path}: the architecture is {architecture!r}, but only 'llama' is built: "
            "give a file of a Llama model."
        )
    names = {tensor.name for tensor in reader.tensors}
    heads = _field(reader, "llama.attention.head_count")
    hidden_size = _field(reader, "llama.embedding_length")
    head_dim = _field(reader, "llama.attention.key_length")
    if head_dim is None and heads and hidden_size:
        head_dim = hidden_size // heads
    _refuse_unbuilt(reader, path, head_dim)
    ends = [_field(reader, f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")]
    ends = sorted({end for end in ends if end is not None})
    embedding = next((t for t in reader.tensors if t.name == "token_embd.weight"), None)
    data = {
        "model_type": "llama",
        "vocab_size": None if embedding is None else int(embedding.shape[1]),
        "hidden_size": hidden_size,
        "intermediate_size": _field(reader, "llama.feed_forward_length"),
        "num_hidden_layers": _field(reader, "llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _field(reader, "llama.attention.head_count_kv"),
        "head_dim": head_dim,
        "rms_norm_eps": _decimal(_field(reader, "llama.attention.layer_norm_rms_epsilon")),
        "max_position_embeddings": _field(reader, "llama.context_length"),
        "rope_theta": _decimal(_field(reader, "llama.rope.freq_base")),
        "tie_word_embeddings": "output.weight" not in names,
        "bos_token_id": _field(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": _field(reader, "tokenizer.ggml.padding_token_id"),
    }
    scaling = _rope_scaling(reader, path, head_dim, data["rope_theta"] or 10000.0)
    return LlamaConfig.from_dict({**data, "rope_scaling": scaling}, str(path))


def _field(reader: GGUFReader, key: str, default: Any = None) -> Any:
    field = reader.get_field(key)
    return default if field is None else field.contents()


def _decimal(value: float | None) -> float | None:
    """A number stored in fp32, as the short decimal that it was written from."""
    return None if value is None else float(str(np.float32(value)))


def _refuse_unbuilt(reader: GGUFReader, path: Path, head_dim: int | None) -> None:
    """What the metadata says beyond a plain Llama model."""
    neutral = {
        "llama.expert_count": 0,
        "llama.attention.value_length": head_dim,
        "llama.rope.dimension_count": head_dim,
        "llama.attention.sliding_window": None,
        "llama.logit_scale": None,
    }
    for key, plain in neutral.items():
        value = _field(reader, key, plain)
        if value != plain:
            raise UserError(
                f"{path}: {key} is {value!r}, which is not built: give a plain Llama model."
            )


def _rope_scaling(
    reader: GGUFReader, path: Path, head_dim: int, theta: float
) -> dict[str, Any] | None:
    """The scaling that the file says, in Hugging Face's words.

    llama.cpp stores llama3 scaling as one divisor a frequency, without the four numbers that they
    came from. They are found again, and proven, by computing the divisors from Llama 3's numbers.
    """
    kind = _field(reader, "llama.rope.scaling.type", "none")
    factor = _field(reader, "llama.rope.scaling.factor", _field(reader, "llama.rope.scale_linear"))
    if kind == "linear" or (kind == "none" and factor not in (None, 0, 1)):
        return {"rope_type": "linear", "factor": _decimal(factor)}
    if kind != "none":
        raise UserError(
            f"{path}: rope scaling {kind!r} is not built (linear and llama3 are): "
            "give a model with one of these."
        )
    stored = next((t for t in reader.tensors if t.name == "rope_freqs.weight"), None)
    if stored is None:
        return None
    divisors = np.asarray(stored.data, dtype=np.float64).reshape(-1)
    if np.allclose(divisors, 1):
        return None
    scaling = {
        "rope_type": "llama3",
        "factor": float(divisors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    wavelength = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    kept = np.clip((8192 / wavelength - 1.0) / (4.0 - 1.0), 0, 1)
    expected = 1 / (kept + (1 - kept) / divisors.max())
    if expected.shape != divisors.shape or not np.allclose(expected, divisors, rtol=1e-4):
        raise UserError(
            f"{path}: the rotary divisors in rope_freqs.weight are not those of Llama 3: "
            "give the model's Hugging Face folder."
        )
    return scaling
