"""A Hugging Face folder as a GGUF file with every matrix in q4_0, for llama.cpp."""

from __future__ import annotations

from pathlib import Path

from gguf import GGMLQuantizationType as Types
from gguf import LlamaFileType

from llamaweft.export.gguf import Quantization, write_gguf
from llamaweft.export.gguf_tokenizer import gguf_tokenizer
from llamaweft.export.originals import originals
from llamaweft.model.folder import read_config
from llamaweft.model.tokenizer import load_tokenizer
from llamaweft.weights.build import Source

EVERY_MATRIX = Quantization(Types.Q4_0, Types.Q4_0, LlamaFileType.MOSTLY_Q4_0)


def write_q4_0(folder: Path, target: Path) -> Path:
    """Write `target`, unless it is there; returns it."""
    if target.exists():
        return target
    config = read_config(folder)
    tokenizer = gguf_tokenizer(
        load_tokenizer(folder), config.vocab_size, config.stop_ids, chat=None
    )
    sources = [Source(t.name, t.shape, t.chunks) for t in originals(folder).values()]
    aside = target.with_suffix(".partial")
    write_gguf(aside, config, sources, tokenizer, EVERY_MATRIX, folder.name)
    return aside.rename(target)
