"""A model folder of a known shape with random weights: for measuring and for tests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from llamaweft.errors import UserError
from llamaweft.files import written_aside
from llamaweft.model.presets import PRESETS, LlamaConfig
from llamaweft.model.save import write_description, write_model
from llamaweft.model.stores import Progress, random_sources, write_random_store
from llamaweft.model.tokenizer import load_tokenizer
from llamaweft.weights.codecs import CODECS, PLAIN

NO_WEIGHTS = "none"


def init_random(
    preset: str,
    folder: Path,
    tokenizer: str,
    base_weights: str = "fp32",
    seed: int = 0,
    progress: Progress | None = None,
) -> LlamaConfig:
    """Write a model folder and return its config.

    base_weights: fp32 and bf16 make a Hugging Face folder; nf4 and int8 a folder with a store of
    that codec, which only llamaweft opens and which is written a few rows at a time; none writes
    config and tokenizer alone, which is all that a plan reads.

    The preset `tiny` takes its vocabulary from the tokenizer; the others keep theirs, which
    must hold it. Raises UserError for an unknown preset, codec or tokenizer, and a used folder.
    """
    if preset not in PRESETS:
        raise UserError(f"unknown preset {preset!r}; known are {', '.join(PRESETS)}")
    if base_weights not in (*CODECS, NO_WEIGHTS):
        known = ", ".join((*CODECS, NO_WEIGHTS))
        raise UserError(f"--base-weights {base_weights}: weights are made as {known}")
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
        if base_weights in PLAIN:
            tensors = random_tensors(config, seed)
            write_model(
                aside,
                config,
                tensors,
                loaded.save_pretrained,
                dtype=PLAIN[base_weights],
                stop_ids=config.stop_ids,
            )
            return config
        write_description(aside, config, loaded.save_pretrained, config.stop_ids)
        if base_weights != NO_WEIGHTS:
            write_random_store(aside, config, base_weights, seed, progress)
    return config


def random_tensors(config: LlamaConfig, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Random fp32 weights of a shape, one tensor at a time, as transformers initialises them:
    matrices normal with `initializer_range`, norms one."""
    for source in random_sources(config, seed):
        yield source.name, next(iter(source.chunks(source.shape[0])))
