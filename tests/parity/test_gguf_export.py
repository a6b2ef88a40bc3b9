"""A GGUF of ours in llama.cpp: the answers of transformers, and the ids of the tokenizer.

Tolerances: relative to the norm of the centred logits. f32 differs by the order of summation; f16
and bf16 round weights and activations to 11 and 8 bits, q8_0 to 8 in blocks.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from llamaweft.errors import RunError
from llamaweft.export import llama_cpp
from llamaweft.export.gguf import QUANTIZATIONS, write_gguf
from llamaweft.export.gguf_tokenizer import gguf_tokenizer
from llamaweft.export.llama_cpp import in_llama_cpp
from llamaweft.export.originals import originals
from llamaweft.export.parity import compare, compared_positions
from llamaweft.model.folder import read_config
from llamaweft.model.init import random_tensors
from llamaweft.model.presets import PRESETS
from llamaweft.model.save import write_model
from llamaweft.model.tokenizer import load_tokenizer
from llamaweft.weights.build import Source

LLAMA3_TOKENIZER = Path(find_spec("llama_models").origin).parent / "llama3/tokenizer.model"
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "factor": 4.0}
PROMPTS = [np.arange(40, 1000, 8), np.array([5, 9, 400, 21])]


@pytest.fixture(autouse=True)
def few_positions(monkeypatch) -> None:
    monkeypatch.setattr(llama_cpp, "POSITIONS", 3)


def model_folder(folder: Path, tokenizer, **changes) -> Path:
    """Random weights, ten times as large as usual, so that attention and rotation matter."""
    folder.mkdir()
    config = replace(PRESETS["tiny"], vocab_size=len(tokenizer), **changes)
    tensors = [
        (name, t * 10 if t.ndim > 1 and ".layers." in name else t)
        for name, t in random_tensors(config, seed=5)
    ]
    write_model(folder, config, tensors, tokenizer.save_pretrained, dtype=torch.float32)
    return folder


def gguf_of(folder: Path, tokenizer, path: Path, name: str, chat: str | None = None) -> Path:
    config = read_config(folder)
    described = gguf_tokenizer(tokenizer, config.vocab_size, [tokenizer.eos_token_id], chat)
    sources = [Source(t.name, t.shape, t.chunks) for t in originals(folder).values()]
    write_gguf(path, config, sources, described, QUANTIZATIONS[name], "tiny")
    return path


def difference(folder: Path, path: Path, tokenizer, chat: str | None = None):
    """llama.cpp's answers beside transformers', and the texts that are read otherwise."""
    size = read_config(folder).vocab_size
    answers = in_llama_cpp(path, tokenizer, False, chat, size, PROMPTS)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    theirs = []
    with torch.inference_mode():
        for ids, places in zip(PROMPTS, answers.given, strict=True):
            logits = model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0]
            theirs.append(logits[compared_positions(len(ids))[places]])
    return compare(theirs, answers.logits, centred=True), answers


@pytest.mark.parametrize(
    ("changes", "name", "tolerance"),
    [
        ({"rope_scaling": LLAMA3}, "f32", 1e-4),
        ({"rope_scaling": LINEAR, "tie_word_embeddings": True}, "f32", 1e-4),
        ({"rope_theta": 1e6, "num_key_value_heads": 4}, "f16", 5e-3),
        ({"head_dim": 32}, "bf16", 3e-2),
        ({}, "q8_0", 3e-2),
    ],
)
def test_llama_cpp_says_what_transformers_says(
    tmp_path: Path, tokenizer, changes: dict, name: str, tolerance: float
) -> None:
    folder = model_folder(tmp_path / "hf", tokenizer, **changes)
    path = gguf_of(folder, tokenizer, tmp_path / "m.gguf", name)
    found, answers = difference(folder, path, tokenizer)
    assert found.tokens == 6
    assert found.relative_difference < tolerance
    assert not answers.other_ids
    assert answers.texts > len(llama_cpp.TEXTS)


def test_llama_cpp_reads_texts_and_chats_of_llama_3_alike(tmp_path: Path, monkeypatch) -> None:
    """With its begin of text, and with a chat template of ours."""
    monkeypatch.setattr(llama_cpp, "POSITIONS", 1)
    tokenizer = load_tokenizer(LLAMA3_TOKENIZER)
    folder = model_folder(tmp_path / "hf", tokenizer, num_hidden_layers=1)
    chat = tokenizer.apply_chat_template(
        list(llama_cpp.CHAT), tokenize=False, add_generation_prompt=True
    )
    path = gguf_of(folder, tokenizer, tmp_path / "m.gguf", "q8_0", chat)
    answers = in_llama_cpp(path, tokenizer, True, chat, len(tokenizer), [PROMPTS[1]])
    assert not answers.other_ids
    assert answers.texts == len(llama_cpp.TEXTS) + llama_cpp.SPECIAL_TEXTS + 1


def test_a_chat_that_is_read_otherwise_is_told(tmp_path: Path, tokenizer) -> None:
    folder = model_folder(tmp_path / "hf", tokenizer, num_hidden_layers=1)
    chat = tokenizer.apply_chat_template(
        list(llama_cpp.CHAT), tokenize=False, add_generation_prompt=True
    )
    path = gguf_of(folder, tokenizer, tmp_path / "m.gguf", "q8_0", chat)
    for given, other in ((chat, ()), (f"{chat} ", (f"{chat} ",))):
        answers = in_llama_cpp(path, tokenizer, False, given, len(tokenizer), [PROMPTS[1]])
        assert answers.other_ids == other


def test_a_file_that_llama_cpp_does_not_open_is_told(tmp_path: Path, tokenizer) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(RunError, match=r"llama\.cpp does not open the export"):
        in_llama_cpp(path, tokenizer, False, None, 100, PROMPTS)
