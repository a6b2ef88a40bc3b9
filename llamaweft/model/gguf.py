"""From a GGUF file of the Llama architecture to a Hugging Face folder.

The layout is llama.cpp's: names and the order of rows as convert_hf_to_gguf.py writes them, the
numbers of each quantisation as the `gguf` library reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from gguf import GGUFReader
from gguf.constants import GGUF_MAGIC
from gguf.quants import dequantize

from llamaweft.errors import UserError
from llamaweft.files import written_aside
from llamaweft.model.gguf_config import gguf_config
from llamaweft.model.gguf_header import check_header
from llamaweft.model.gguf_tokenizer import save_gguf_tokenizer
from llamaweft.model.presets import LlamaConfig
from llamaweft.model.save import write_model
from llamaweft.runtime import DTYPES

Rows = TypeVar("Rows", np.ndarray, torch.Tensor)

Reading = tuple[str, Callable[[], np.ndarray]]
"""A tensor's Hugging Face name, and what reads it."""

TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}


def convert_gguf(path: Path, folder: Path, dtype: str = "fp32") -> None:
    """Write the model in a GGUF file as a Hugging Face folder.

    The folder holds config.json, generation_config.json, model.safetensors (or shards with an
    index) and the tokenizer. `dtype`: fp32 or bf16. It appears complete or not at all.

    Raises UserError when the file is missing, not GGUF, cut short, of another architecture or
    uses what is not built, and when the folder exists and is not empty.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is unknown: give one of {', '.join(DTYPES)}.")
    with written_aside(folder) as aside:
        with _sensible(path):
            reader = _open(path)
            config = gguf_config(reader, path)
            readings = _tensors(reader, config, path)

        def save_tokenizer(target: Path) -> None:
            with _sensible(path):
                save_gguf_tokenizer(reader, path, target, config.vocab_size)

        write_model(
            aside,
            config,
            ((name, torch.from_numpy(read())) for name, read in readings),
            save_tokenizer,
            dtype=DTYPES[dtype],
            stop_ids=config.stop_ids,
        )


@contextmanager
def _sensible(path: Path) -> Iterator[None]:
    """One sentence for metadata that makes no sense, as of a wrong type or a token that is not
    there, which ends in whatever the libraries do with it."""
    try:
        yield
    except (UserError, OSError):
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise UserError(
            f"{path}: its metadata makes no sense ({type(error).__name__}: {reason}): "
            "download it again, or give the model's Hugging Face folder."
        ) from None


def _open(path: Path) -> GGUFReader:
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): name a .gguf file.") from None
    if magic != GGUF_MAGIC.to_bytes(4, "little"):
        raise UserError(f"{path}: is not a GGUF file: name a .gguf file.")
    check_header(path)
    try:
        return GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise UserError(
            f"{path}: cannot be read as GGUF, most likely because it is cut short ({error}): "
            "download it again."
        ) from None


def _tensors(reader: GGUFReader, config: LlamaConfig, path: Path) -> list[Reading]:
    """Name and reading of every tensor, in the order of the file, once all are known to fit."""
    wanted = _shapes(config)
    found: list[Reading] = []
    for tensor in reader.tensors:
        if tensor.name == "rope_freqs.weight":
            continue
        name = _hugging_face_name(tensor.name)
        shape = tuple(int(size) for size in reversed(tensor.shape))
        if name not in wanted:
            raise UserError(
                f"{path}: the tensor {tensor.name} is not part of a Llama model: "
                "give a plain Llama model."
            )
        if shape != wanted.pop(name):
            raise UserError(
                f"{path}: the tensor {tensor.name} has the shape {shape}, which the metadata "
                "contradicts: download the file again."
            )
        found.append((name, partial(_read, tensor, name, config, path)))
    if wanted:
        raise UserError(
            f"{path}: {next(iter(wanted))} is missing: give a file that holds a whole model."
        )
    return found


def _shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model under its Hugging Face name."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    layer = {
        "self_attn.q_proj.weight": (q, hidden),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.v_proj.weight": (kv, hidden),
        "self_attn.o_proj.weight": (hidden, q),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    for index in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    return shapes


def _hugging_face_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`; unknown names stay."""
    if name.startswith("blk."):
        _, layer, rest = name.split(".", 2)
        return f"model.layers.{layer}.{LAYER_NAMES.get(rest, rest)}"
    return TOP_NAMES.get(name, name)


def _read(tensor: Any, name: str, config: LlamaConfig, path: Path) -> np.ndarray:
    try:
        values = dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError:
        raise UserError(
            f"{path}: the quantisation {tensor.tensor_type.name} of {tensor.name} cannot be read: "
            "give a file in another quantisation."
        ) from None
    if name.endswith("q_proj.weight"):
        values = split_halves(values, config.num_attention_heads)
    if name.endswith("k_proj.weight"):
        values = split_halves(values, config.num_key_value_heads)
    return np.array(values, dtype=np.float32)


def split_halves(rows: Rows, heads: int) -> Rows:
    """From llama.cpp's and Meta's order of the query and key rows to Hugging Face's.

    They turn neighbouring rows (2i, 2i + 1) of a head, Hugging Face rows (i, i + D/2);
    `LlamaModel.permute` of convert_hf_to_gguf.py went the other way.
    """
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)
