"""A model folder of a known shape with random weights: for measuring and for tests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from llamaweft.errors import UserError
from llamaweft.model.load import random_tensors
from llamaweft.model.presets import PRESETS, LlamaConfig
from llamaweft.model.save import write_model, written_aside
from llamaweft.model.tokenizer import load_tokenizer
from llamaweft.runtime import DTYPES


def init_random(
    preset: str, folder: Path, tokenizer: str, base_weights: str = "fp32", seed: int = 0
) -> LlamaConfig:
    """Write a Hugging Face folder and return its config. `base_weights`: fp32 or bf16.

    The preset `tiny` takes its vocabulary from the tokenizer; the others keep theirs, which
    must hold it. Raises UserError for an unknown preset, dtype or tokenizer, and a used folder.
    """
    if preset not in PRESETS:
        raise UserError(f"unknown preset {preset!r}; known are {', '.join(PRESETS)}")
    if base_weights not in DTYPES:
        raise UserError(f"--base-weights {base_weights}: weights are made as fp32 or bf16")
    loaded = load_tokenizer(tokenizer)
    config = PRESETS[preset]
    if preset == "tiny":
        config = replace(
            config,
            vocab_size=len(loaded),
            bos_token_id=loaded.bos_token_id,
            eos_token_id=loaded.eos_token_id,
            pad_token_id=loaded.pad_token_id,
        )
    elif len(loaded) > config.vocab_size:
        raise UserError(
            f"the tokenizer {tokenizer} has {len(loaded)} tokens, {preset} has "
            f"{config.vocab_size}; give the Llama 3 tokenizer"
        )
    with written_aside(folder) as aside:
        write_model(
            aside,
            config,
            random_tensors(config, seed),
            loaded.save_pretrained,
            dtype=DTYPES[base_weights],
            stop_ids=config.stop_ids,
        )
    return config
