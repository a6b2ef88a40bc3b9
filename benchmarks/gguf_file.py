"""A Hugging Face folder as a GGUF file with every matrix in q4_0, for llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Types
from safetensors import safe_open

from llamaweft.model.gguf import LAYER_NAMES, TOP_NAMES

OUTSIDE = {ours: theirs for theirs, ours in TOP_NAMES.items()}
LAYER = {ours: theirs for theirs, ours in LAYER_NAMES.items()}


def write_q4_0(folder: Path, target: Path) -> Path:
    """Write `target`, unless it is there; returns it."""
    if target.exists():
        return target
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    aside = target.with_suffix(".partial")
    writer = gguf.GGUFWriter(aside, "llama")
    _describe(writer, folder, config)
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                values = tensors.get_tensor(name).to(torch.float32).numpy()
                theirs = _name(name)
                if "attn_q." in theirs or "attn_k." in theirs:
                    values = _paired(values, config)
                if values.ndim == 1:
                    writer.add_tensor(theirs, values)
                else:
                    packed = gguf.quants.quantize(values, Types.Q4_0)
                    writer.add_tensor(theirs, packed, raw_dtype=Types.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return aside.rename(target)


def _name(name: str) -> str:
    if name in OUTSIDE:
        return OUTSIDE[name]
    number, _, part = name.removeprefix("model.layers.").partition(".")
    return f"blk.{number}.{LAYER[part]}"


def _paired(w_OI: np.ndarray, config: dict) -> np.ndarray:
    """Rows in the order of rotation by neighbouring pairs, which llama.cpp expects."""
    size = config["hidden_size"] // config["num_attention_heads"]
    halves = w_OI.reshape(-1, 2, size // 2, w_OI.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(w_OI.shape)


def _describe(writer: gguf.GGUFWriter, folder: Path, config: dict) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config.get("rope_theta") or config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    ids = tokenizer["model"]["vocab"] | {t["content"]: t["id"] for t in tokenizer["added_tokens"]}
    control = {t["id"] for t in tokenizer["added_tokens"]}
    names = {number: text for text, number in ids.items()}
    size = config["vocab_size"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list([names.get(i, f"<unused {i}>") for i in range(size)])
    normal, special = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL
    writer.add_token_types([special if i in control else normal for i in range(size)])
    merges = tokenizer["model"]["merges"]
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_bos_token_id(config["bos_token_id"])
    ends = config["eos_token_id"]
    writer.add_eos_token_id(ends[0] if isinstance(ends, list) else ends)
