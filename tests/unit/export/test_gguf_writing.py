"""GGUF out: what our own reader, which llama.cpp's converter is the model of, reads back."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from llamaweft.errors import UserError
from llamaweft.export.gguf import (
    QUANTIZATIONS,
    check_quantization,
    gguf_bytes,
    paired,
    rope_divisors,
    write_gguf,
)
from llamaweft.export.gguf_tokenizer import GgufTokenizer, gguf_tokenizer
from llamaweft.model import gguf as reader
from llamaweft.model.attention import rotary_frequencies
from llamaweft.model.gguf import convert_gguf, split_halves
from llamaweft.model.init import random_tensors
from llamaweft.model.presets import PRESETS, LlamaConfig
from llamaweft.model.tokenizer import load_tokenizer
from llamaweft.weights import build
from llamaweft.weights.build import Source

CHAT = "<|im_start|>user\nHi<|im_end|>\n"
LLAMA3_TOKENIZER = Path(find_spec("llama_models").origin).parent / "llama3/tokenizer.model"
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def config_of(tokenizer, **changes) -> LlamaConfig:
    return replace(
        PRESETS["tiny"],
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **changes,
    )


def small(**changes) -> tuple[LlamaConfig, GgufTokenizer]:
    """A vocabulary of 320, of which nothing but the number matters."""
    tokens = [f"t{i}" for i in range(320)]
    told = GgufTokenizer("gpt-2", tokens, [1] * 320, [], {}, False, False, None)
    return replace(PRESETS["tiny"], vocab_size=320, rope_theta=500000.0, **changes), told


def written(
    path: Path, config: LlamaConfig, told: GgufTokenizer, name: str
) -> dict[str, torch.Tensor]:
    """A file of random weights; returns these."""
    tensors = dict(random_tensors(config, seed=4))
    sources = [
        Source(k, tuple(t.shape), lambda rows, t=t: t.split(rows)) for k, t in tensors.items()
    ]
    write_gguf(path, config, sources, told, QUANTIZATIONS[name], "a name")
    assert 0 <= path.stat().st_size - gguf_bytes(sources, QUANTIZATIONS[name]) < 4 * 2**20
    return tensors


def read_back(path: Path, monkeypatch) -> tuple[dict[str, torch.Tensor], LlamaConfig]:
    """Tensors and config, as our reader has them; not the tokenizer."""
    monkeypatch.setattr(reader, "save_gguf_tokenizer", lambda *given: None)
    back = path.with_name("back")
    convert_gguf(path, back)
    content = json.loads((back / "config.json").read_text())
    return load_file(back / "model.safetensors"), LlamaConfig.from_dict(content, "back")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scaling", [None, LLAMA3, {"rope_type": "linear", "factor": 4.0}])
def test_a_file_in_f32_is_read_back_bit_for_bit(
    tmp_path: Path, monkeypatch, tied: bool, scaling: dict | None
) -> None:
    monkeypatch.setattr(build, "CHUNK_BYTES", 4 * 64 * 100)  # in parts
    config, told = small(tie_word_embeddings=tied, rope_scaling=scaling)
    tensors = written(tmp_path / "m.gguf", config, told, "f32")
    found, back = read_back(tmp_path / "m.gguf", monkeypatch)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert back == config


def test_the_tokenizer_is_read_back(tmp_path: Path, tokenizer) -> None:
    config = config_of(tokenizer)
    stops = [tokenizer.eos_token_id]
    told = gguf_tokenizer(tokenizer, config.vocab_size, stops, CHAT)
    written(tmp_path / "m.gguf", config, told, "q8_0")
    convert_gguf(tmp_path / "m.gguf", tmp_path / "back")
    again = load_tokenizer(tmp_path / "back")
    for text in ("Hello,  world 123!", "<|im_start|>user\n你好", "a\n\n\nb"):
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.chat_template == tokenizer.chat_template
    back = json.loads((tmp_path / "back/config.json").read_text())
    assert [back[f"{role}_token_id"] for role in ("bos", "eos", "pad")] == [
        tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [("f16", 5e-4), ("bf16", 4e-3), ("q8_0", 8e-3), ("q5_1", 0.06), ("q5_0", 0.06), ("q4_1", 0.12), ("q4_0", 0.12)],
)  # fmt: skip
def test_a_quantisation_is_near_and_small_tensors_stay_fp32(
    tmp_path: Path, monkeypatch, name: str, tolerance: float
) -> None:
    """Tolerances: half a step of the format over the deviation of normal numbers."""
    tensors = written(tmp_path / "m.gguf", *small(), name)
    found, _ = read_back(tmp_path / "m.gguf", monkeypatch)
    for key, tensor in tensors.items():
        error = (found[key] - tensor).norm() / tensor.norm()
        assert error == 0 if tensor.ndim == 1 else 0 < error < tolerance, key
    kinds = {t.name: t.tensor_type.name for t in GGUFReader(tmp_path / "m.gguf").tensors}
    assert kinds["blk.0.attn_q.weight"] == kinds["token_embd.weight"] == name.upper()
    head = name.upper() if name in ("f16", "bf16") else "Q8_0"
    assert kinds["output.weight"] == head
    assert kinds["blk.0.attn_norm.weight"] == kinds["output_norm.weight"] == "F32"


def test_where_embedding_and_head_are_one_it_is_held_as_the_head(tmp_path: Path) -> None:
    written(tmp_path / "m.gguf", *small(tie_word_embeddings=True), "q4_0")
    kinds = {t.name: t.tensor_type.name for t in GGUFReader(tmp_path / "m.gguf").tensors}
    assert kinds["token_embd.weight"] == "Q8_0"
    assert "output.weight" not in kinds


def test_pairs_of_rows_by_hand() -> None:
    rows = np.array(["a0", "b0", "a1", "b1", "c0", "d0", "c1", "d1"])
    # Halves of the first head: a0 b0 | a1 b1, so a0 turns with a1.
    assert paired(rows[:, None], heads=2)[:, 0].tolist() == [
        "a0", "a1", "b0", "b1", "c0", "c1", "d0", "d1",
    ]  # fmt: skip
    assert split_halves(paired(rows[:, None], 2), 2)[:, 0].tolist() == rows.tolist()


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_divisors_are_those_of_the_models_frequencies(factor: float) -> None:
    config = replace(PRESETS["llama3.1-8b"], rope_scaling=LLAMA3 | {"factor": factor})
    divisors = rope_divisors(config)
    plain = rotary_frequencies(replace(config, rope_scaling=None))
    assert divisors is not None
    assert {divisors.min(), divisors.max()} == {1.0, factor}
    np.testing.assert_allclose(plain.numpy() / divisors, rotary_frequencies(config), rtol=2e-6)
    assert rope_divisors(replace(config, rope_scaling=None)) is None


@pytest.mark.parametrize(
    ("name", "width", "words"),
    [
        ("q4_k", 64, "give one of f32, f16, bf16, q8_0, .*llama-quantize"),
        ("Q8_0", 64, "give one of f32"),
        ("q8_0", 72, "blocks of 32, and this model has rows of 72 numbers"),
    ],
)
def test_a_quantisation_that_cannot_be_is_refused(name: str, width: int, words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_quantization(name, replace(PRESETS["tiny"], hidden_size=width))


def test_every_row_of_the_model_has_a_name_and_a_kind(tokenizer) -> None:
    rows = len(tokenizer) + 3
    told = gguf_tokenizer(tokenizer, rows, [2], CHAT)
    assert (told.cut, told.adds_begin, told.adds_end) == ("smollm", False, False)
    assert told.tokens[-3:] == [f"[PAD{rows - 3}]", f"[PAD{rows - 2}]", f"[PAD{rows - 1}]"]
    assert told.types[-3:] == [5, 5, 5]  # unused
    assert told.types[tokenizer.convert_tokens_to_ids("<|im_end|>")] == 3  # control
    assert told.types[1000] == 1


def test_an_end_of_turn_beside_the_end_of_text_and_an_added_word() -> None:
    tokenizer = load_tokenizer("builtin:smollm2-135m")
    tokenizer.add_tokens([AddedToken("<word>", special=False, normalized=False)])
    eos = tokenizer.eos_token_id
    told = gguf_tokenizer(tokenizer, len(tokenizer), [eos, 0, 5], None)
    assert (told.ids["eos"], told.ids["eot"], told.ids["eom"]) == (eos, 5, 0)
    assert (told.tokens[-1], told.types[-1]) == ("<word>", 4)  # user defined


def test_llama_3_begins_a_text_and_a_chat_that_does_not_asks_for_none() -> None:
    tokenizer = load_tokenizer(LLAMA3_TOKENIZER)
    stops = [tokenizer.eos_token_id]
    told = gguf_tokenizer(tokenizer, len(tokenizer), stops, "<|begin_of_text|><|start_header_id|>")
    assert (told.cut, told.adds_begin, len(told.tokens)) == ("llama-bpe", True, 128256)
    assert gguf_tokenizer(tokenizer, 128256, stops, None).adds_begin
    assert not gguf_tokenizer(tokenizer, 128256, stops, CHAT).adds_begin


def other(**changes) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE({"a": 0, "b": 1, "<s>": 2}, [], **changes))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")


def test_another_kind_of_tokenizer_is_refused() -> None:
    with pytest.raises(UserError, match=r"no byte-level BPE.*export --to hf"):
        gguf_tokenizer(other(byte_fallback=True), 3, [], None)
    with pytest.raises(UserError, match="cuts text in a way that is not known here"):
        gguf_tokenizer(other(), 3, [], None)


def test_a_normalizer_is_another_way_of_reading(tokenizer) -> None:
    changed = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    )
    assert gguf_tokenizer(changed, len(changed), [], None).cut == "smollm"
    changed.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(UserError, match="cuts text in a way that is not known here"):
        gguf_tokenizer(changed, len(changed), [], None)
