"""A model as one GGUF file, for llama.cpp and what is built on it.

Names, order of rows and metadata are those of llama.cpp's convert_hf_to_gguf.py; the numbers of a
quantisation are the `gguf` library's. Written a few rows at a time.

O: output features   I: input features   H: heads   D: head size
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGUFWriter, LlamaFileType, RopeScalingType
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Types
from gguf.quants import quantize
from torch import Tensor

from llamaweft.errors import UserError
from llamaweft.export.gguf_tokenizer import GgufTokenizer
from llamaweft.model.gguf import LAYER_NAMES, TOP_NAMES
from llamaweft.model.presets import LlamaConfig
from llamaweft.weights.build import Source, rows_at_once

OUTSIDE = {ours: theirs for theirs, ours in TOP_NAMES.items()}
LAYER = {ours: theirs for theirs, ours in LAYER_NAMES.items()}
LAYER_PREFIX = "model.layers."
OUTPUT, EMBEDDING = "output.weight", "token_embd.weight"
QUERY_KEY = {"attn_q.weight": "num_attention_heads", "attn_k.weight": "num_key_value_heads"}


@dataclass(frozen=True)
class Quantization:
    """matrices: how they are held. output: how the head is, which is more sensitive (llama.cpp
    takes q6_K, which the `gguf` library cannot make). file_type: llama.cpp's name of the whole."""

    matrices: Types
    output: Types
    file_type: LlamaFileType


QUANTIZATIONS = {
    "f32": Quantization(Types.F32, Types.F32, LlamaFileType.ALL_F32),
    "f16": Quantization(Types.F16, Types.F16, LlamaFileType.MOSTLY_F16),
    "bf16": Quantization(Types.BF16, Types.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": Quantization(Types.Q8_0, Types.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q5_1": Quantization(Types.Q5_1, Types.Q8_0, LlamaFileType.MOSTLY_Q5_1),
    "q5_0": Quantization(Types.Q5_0, Types.Q8_0, LlamaFileType.MOSTLY_Q5_0),
    "q4_1": Quantization(Types.Q4_1, Types.Q8_0, LlamaFileType.MOSTLY_Q4_1),
    "q4_0": Quantization(Types.Q4_0, Types.Q8_0, LlamaFileType.MOSTLY_Q4_0),
}


def check_quantization(name: str, config: LlamaConfig) -> None:
    """Raises UserError for a name that is not built, and for a model whose rows it cannot cut."""
    if name not in QUANTIZATIONS:
        raise UserError(
            f"--quantization {name}: give one of {', '.join(QUANTIZATIONS)}; for k-quants export "
            "f16 or bf16 and run llama.cpp's llama-quantize on it"
        )
    kinds = {QUANTIZATIONS[name].matrices, QUANTIZATIONS[name].output}
    block = max(GGML_QUANT_SIZES[kind][0] for kind in kinds)
    inner = config.num_attention_heads * config.head_dim
    for width in (config.hidden_size, config.intermediate_size, inner):
        if width % block:
            raise UserError(
                f"--quantization {name} cuts rows into blocks of {block}, and this model has rows "
                f"of {width} numbers; give f16 or bf16"
            )


def gguf_bytes(sources: Sequence[Source], quantization: Quantization) -> int:
    """What the tensors of a file take."""
    return sum(_size(*_placed(source, quantization, sources)[1:]) for source in sources)


def write_gguf(
    path: Path,
    config: LlamaConfig,
    sources: Sequence[Source],
    tokenizer: GgufTokenizer,
    quantization: Quantization,
    model_name: str,
) -> None:
    """Write a new file. sources: the tensors under their Hugging Face names.

    Raises OSError; for what `check_quantization` refuses, what the `gguf` library raises.
    """
    writer = GGUFWriter(path, "llama")
    _describe(writer, config, quantization, model_name)
    tokenizer.write(writer)
    planned = [(_placed(source, quantization, sources), source) for source in sources]
    for (name, shape, kind), _ in planned:
        writer.add_tensor_info(name, shape, np.dtype(np.float32), _size(shape, kind), kind)
    divisors = rope_divisors(config)
    if divisors is not None:
        writer.add_tensor_info("rope_freqs.weight", divisors.shape, divisors.dtype, divisors.nbytes)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for (name, _, kind), source in planned:
            _write_tensor(writer, _in_order(name, source, config), kind)
        if divisors is not None:
            _write_tensor(writer, iter([divisors]), Types.F32)
    finally:
        writer.close()


def _write_tensor(writer: GGUFWriter, parts: Iterator[np.ndarray], kind: Types) -> None:
    """A tensor from its parts. (The library's own way wants it whole.)"""
    assert writer.fout is not None
    (file,) = writer.fout
    writer.write_padding(file, file.tell())
    for part in parts:
        file.write(np.ascontiguousarray(quantize(part, kind)).data)
    writer.write_padding(file, file.tell())


def _placed(
    source: Source, quantization: Quantization, sources: Sequence[Source]
) -> tuple[str, tuple[int, ...], Types]:
    """A tensor's name, shape and kind in the file. Where embedding and head are one matrix, that is
    held as the head would be."""
    name = gguf_name(source.name)
    if len(source.shape) == 1:
        return name, source.shape, Types.F32
    tied = all(other.name != "lm_head.weight" for other in sources)
    is_output = name == OUTPUT or (tied and name == EMBEDDING)
    return name, source.shape, quantization.output if is_output else quantization.matrices


def gguf_name(name: str) -> str:
    """`model.layers.3.self_attn.q_proj.weight` -> `blk.3.attn_q.weight`."""
    if not name.startswith(LAYER_PREFIX):
        return OUTSIDE[name]
    layer, _, part = name.removeprefix(LAYER_PREFIX).partition(".")
    return f"blk.{layer}.{LAYER[part]}"


def _size(shape: tuple[int, ...], kind: Types) -> int:
    block, size = GGML_QUANT_SIZES[kind]
    return math.prod(shape) // block * size


def _in_order(name: str, source: Source, config: LlamaConfig) -> Iterator[np.ndarray]:
    """The rows of a tensor in llama.cpp's order, some at a time."""
    heads = QUERY_KEY.get(".".join(name.split(".")[2:]))
    if heads is None:
        for rows in source.chunks(rows_at_once(source.shape)):
            yield _array(rows)
        return
    # Rows change places within a head, so a matrix of heads is taken whole; these are small.
    whole = np.concatenate([_array(rows) for rows in source.chunks(source.shape[0])])
    yield paired(whole, getattr(config, heads))


def _array(rows: Tensor) -> np.ndarray:
    values: np.ndarray = rows.detach().float().cpu().numpy()
    return values


def paired(w_OI: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys in llama.cpp's order, which turns neighbouring rows of a head,
    (2i, 2i + 1), where Hugging Face turns rows (i, i + D/2): `LlamaModel.permute` of
    convert_hf_to_gguf.py. The way back is model/gguf.py's `split_halves`."""
    halves = w_OI.reshape(heads, 2, w_OI.shape[0] // heads // 2, *w_OI.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(w_OI.shape)


def rope_divisors(config: LlamaConfig) -> np.ndarray | None:
    """What llama.cpp divides each frequency by, for rope_type llama3; None for others.

    Long wavelengths by `factor`, short ones by 1, those between by a blend: transformers'
    `_compute_llama3_parameters`.
    """
    scaling = config.rope_scaling
    if scaling is None or scaling["rope_type"] != "llama3":
        return None
    exponent = np.arange(0, config.head_dim, 2) / config.head_dim
    wavelength = 2 * np.pi * config.rope_theta**exponent
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    context = scaling["original_max_position_embeddings"]
    kept = np.clip((context / wavelength - low) / (high - low), 0, 1)
    return (1 / (kept + (1 - kept) / scaling["factor"])).astype(np.float32)


def _describe(
    writer: GGUFWriter, config: LlamaConfig, quantization: Quantization, model_name: str
) -> None:
    writer.add_type("model")
    writer.add_name(model_name)
    writer.add_file_type(quantization.file_type)
    writer.add_quantization_version(2)  # of the layout of blocks, GGML_QNT_VERSION
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    scaling = config.rope_scaling
    if scaling is not None and scaling["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(scaling["factor"])
