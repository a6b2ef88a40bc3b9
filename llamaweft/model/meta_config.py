"""What Meta's params.json says about a model.

Keys and their meaning: Meta's llama-models, llama3/args.py and llama3/model.py. What they leave
open (context, scaling factor) is as in transformers 4, convert_llama_weights_to_hf.py.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from llamaweft.errors import UserError
from llamaweft.model.presets import LlamaConfig, llama3_scaling

PARAMS = "params.json"
OF_THE_PROGRAM = ("max_batch_size", "max_seq_len")
"""Keys that say how Meta's program runs, and nothing about the model."""
KNOWN = (
    "dim",
    "n_layers",
    "n_heads",
    "n_kv_heads",
    "vocab_size",
    "multiple_of",
    "ffn_dim_multiplier",
    "norm_eps",
    "rope_theta",
    "use_scaled_rope",
    *OF_THE_PROGRAM,
)
LLAMA3_VOCABULARY = 128_256
LLAMA1_EPS = 1e-6
"""Llama 1's norm_eps, by which it is told from Llama 2."""


def meta_config(
    folder: Path, vocab_size: int, tied: bool, begin_id: int | None, end_ids: list[int]
) -> LlamaConfig:
    """The shape of the model in one of Meta's folders.

    vocab_size: the rows of the embedding. tied: whether the head is the embedding.

    `intermediate_size` is 8/3 `dim`, times `ffn_dim_multiplier`, rounded up to `multiple_of`. The
    context is 8192 tokens for Llama 3, 131072 where the rotary frequencies are scaled (by 8; by 32
    in tied models, which are Llama 3.2's), 16384 for Code Llama, else 4096, and 2048 for Llama 1.

    Raises UserError for a file that is missing or unreadable, a key that is missing, malformed or
    unknown, and a vocabulary that the embedding contradicts.
    """
    path = folder / PARAMS
    params = _read(path)
    dim = _whole(params, "dim", path)
    heads = _whole(params, "n_heads", path)
    said = params.get("vocab_size", -1)
    if said not in (-1, vocab_size):
        raise UserError(
            f"{path}: vocab_size is {said!r}, and the embedding has {vocab_size} rows; "
            "take the model's own files"
        )
    theta = _number(params, "rope_theta", path, 10_000.0)
    eps = _number(params, "norm_eps", path, None)
    scaled = params.get("use_scaled_rope") or False
    if not isinstance(scaled, bool):
        raise UserError(f"{path}: use_scaled_rope is {scaled!r}, and must be true or false")
    factor = _number(params, "ffn_dim_multiplier", path, 1.0)
    multiple = _whole(params, "multiple_of", path, 256)
    data = {
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": dim,
        "intermediate_size": multiple * -(-int(factor * int(8 * dim / 3)) // multiple),
        "num_hidden_layers": _whole(params, "n_layers", path),
        "num_attention_heads": heads,
        "num_key_value_heads": _whole(params, "n_kv_heads", path, heads),
        "rms_norm_eps": eps,
        "rope_theta": theta,
        "rope_scaling": llama3_scaling(32.0 if tied else 8.0) if scaled else None,
        "max_position_embeddings": _context(vocab_size, scaled, theta, eps),
        "tie_word_embeddings": tied,
        "bos_token_id": begin_id,
        "eos_token_id": end_ids[0] if len(end_ids) == 1 else end_ids or None,
    }
    return LlamaConfig.from_dict(data, str(path))


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing; download the model again") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    params = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(params, dict):
        raise UserError(f"{path} is no mapping of keys; take the model's own params.json")
    unknown = [key for key, value in params.items() if key not in KNOWN and value is not None]
    if unknown:
        raise UserError(
            f"{path}: {repr(min(unknown))[1:-1]} is {params[min(unknown)]!r:.80}, which is not "
            "built; give a plain Llama model (no quantisation, no experts, no images)"
        )
    return params


def _whole(params: dict[str, Any], key: str, path: Path, default: int | None = None) -> int:
    value = params.get(key)
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
        raise UserError(
            f"{path}: {key} is {str(value)[:80]}, but must be a whole number above zero; "
            "take the model's own params.json"
        )
    return value


def _number(params: dict[str, Any], key: str, path: Path, default: float | None) -> float:
    value: Any = params.get(key)
    if value is None and default is not None:
        return default
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    if not plain or not math.isfinite(value) or not 0 < value < 1e12:
        raise UserError(
            f"{path}: {key} is {str(value)[:80]}, but must be a number above zero; "
            "take the model's own params.json"
        )
    return float(value)


def _context(vocab_size: int, scaled: bool, theta: float, eps: float) -> int:
    if scaled:
        return 131_072
    if vocab_size == LLAMA3_VOCABULARY:
        return 8192
    if theta > 10_000:
        return 16_384
    return 2048 if eps <= LLAMA1_EPS else 4096
