"""Trained rows of new tokens against peft's `trainable_token_indices`, on a model that transformers
resized: loss, gradients and merged logits, fp32, 1e-5 of the norm (order of summation)."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from peft import LoraConfig as PeftConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llamaweft.adapters.folder import adapter_state, load_adapter_state, save_adapter
from llamaweft.adapters.lora import LoraConfig, inject
from llamaweft.data.chat import Document
from llamaweft.export.hf import export_merged
from llamaweft.model.init import random_tensors
from llamaweft.model.llama import LlamaForCausalLM
from llamaweft.model.load import load_causal_lm
from llamaweft.model.new_tokens import NewTokens, add_new_tokens, grow
from llamaweft.model.pack import Pack
from llamaweft.model.presets import PRESETS
from llamaweft.model.save import write_model
from llamaweft.model.tokenizer import load_tokenizer
from llamaweft.weights.grown import row_parameters

TOKENS = ["<tool>", "<|city|>", "tremendissimo"]
SPARE = {"no spare row": 0, "a spare row": 1, "spare rows": 5}
"""Rows of the model that its tokenizer has no token for."""

KINDS = [
    (True, "no spare row"),
    (True, "a spare row"),
    (False, "no spare row"),
    (False, "spare rows"),
]


def named(kind: tuple[bool, str]) -> str:
    return f"{'tied' if kind[0] else 'untied'}, {kind[1]}"


@pytest.fixture(scope="module", params=KINDS, ids=named)
def folder(request, tmp_path_factory) -> Path:
    """A tiny model, its head tied to its embedding or not."""
    tied, spare = request.param
    folder = tmp_path_factory.mktemp("grown")
    tokenizer = load_tokenizer("builtin:smollm2-135m")
    vocabulary = len(tokenizer) + SPARE[spare]
    config = replace(PRESETS["tiny"], vocab_size=vocabulary, tie_word_embeddings=tied)
    write_model(
        folder, config, random_tensors(config, 1), tokenizer.save_pretrained, dtype=torch.float32
    )
    return folder


def grown_tokenizer(folder: Path) -> tuple[object, NewTokens]:
    tokenizer = load_tokenizer(folder)
    vocab_size = load_causal_lm(folder, base_weights="fp32").config.vocab_size
    return tokenizer, add_new_tokens(tokenizer, [(t, False) for t in TOKENS], vocab_size)


def resized(folder: Path) -> tuple[torch.nn.Module, list[int]]:
    """By transformers, with the mean of each token's pieces as its row; and the tokens' ids."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pieces = [tokenizer(token, add_special_tokens=False).input_ids for token in TOKENS]
    assert all(len(of_token) > 1 for of_token in pieces)
    tokenizer.add_tokens(TOKENS)
    ids = tokenizer.convert_tokens_to_ids(TOKENS)
    if len(tokenizer) > model.config.vocab_size:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        for matrix in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
            for token_id, of_token in zip(ids, pieces, strict=True):
                matrix[token_id] = matrix[of_token].mean(0)
    return model, ids


def document(ids: list[int], count: int = 48) -> Document:
    """Each new token several times, and others before and behind it."""
    tokens = np.random.default_rng(0).integers(0, 900, count).astype(np.int32)
    tokens[3::7] = [ids[i % len(ids)] for i in range(len(tokens[3::7]))]
    return Document(tokens, np.ones(count, np.float32), "")


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def ours_and_theirs(folder: Path) -> tuple[LlamaForCausalLM, torch.nn.Module, list[int]]:
    """Both with the same random LoRA weights, and the rows that each begins with."""
    ours = load_causal_lm(folder, base_weights="fp32")
    new = grown_tokenizer(folder)[1]
    grow(ours, new)
    inject(ours, LoraConfig(r=4, lora_alpha=12))
    for rows in row_parameters(ours).values():
        rows.requires_grad_(True)
    base, ids = resized(folder)
    assert list(new.ids) == ids
    tied = base.config.tie_word_embeddings
    trained = {"embed_tokens": ids} | ({} if tied else {"lm_head": ids})
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = PeftConfig(
        r=4,
        lora_alpha=12,
        target_modules=targets,
        trainable_token_indices=trained,
        task_type="CAUSAL_LM",
    )
    theirs = get_peft_model(base, config)
    torch.manual_seed(3)
    state = adapter_state(ours)
    state |= {n: torch.randn(t.shape) * 0.1 for n, t in state.items() if ".lora_" in n}
    load_adapter_state(ours, state, "test")
    named = dict(theirs.named_parameters())
    for name, value in state.items():
        if ".lora_" in name:
            named[name.replace(".weight", ".default.weight")].data.copy_(value)
    return ours, theirs, ids


def test_forward_gradients_and_merged_logits(folder: Path, tmp_path: Path) -> None:
    ours, theirs, ids = ours_and_theirs(folder)
    own = document(ids)
    given = torch.from_numpy(own.ids.astype(np.int64))
    logits = theirs(given[None]).logits[0]
    loss = torch.nn.functional.cross_entropy(logits[:-1], given[1:], reduction="sum")
    loss.backward()
    total, _ = ours.loss(Pack.from_documents([own]))
    total.backward()
    assert relative(total.detach(), loss.detach()) < 1e-5
    their = dict(theirs.named_parameters())
    compared = []
    for name, parameter in ours.named_parameters():
        if not parameter.requires_grad:
            continue
        key = name.replace(".trainable", ".token_adapter.trainable") + ".default"
        grad = their[f"base_model.model.{key}{'.weight' if '.lora_' in name else ''}"].grad
        assert relative(parameter.grad, grad) < 1e-5, name
        compared.append(name)
    rows = [name for name in compared if "trainable_tokens_delta" in name]
    assert len(rows) == (1 if ours.config.tie_word_embeddings else 2)
    assert len(compared) == sum(p.requires_grad for p in theirs.parameters())

    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if name in rows:  # away from where they began
                moved = torch.randn(parameter.shape) * 0.3
                parameter.copy_(moved)
                key = name.replace(".trainable", ".token_adapter.trainable")
                their[f"base_model.model.{key}.default"].copy_(moved)
    tokenizer = grown_tokenizer(folder)[0]
    export_merged(ours, tokenizer, tmp_path, "fp32", [])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        want = theirs.merge_and_unload()(given[None]).logits[0]
        assert relative(ours(Pack.from_documents([own])), want) < 1e-5
        assert merged.config.vocab_size == merged.get_input_embeddings().weight.shape[0]
        assert len(AutoTokenizer.from_pretrained(tmp_path)) <= merged.config.vocab_size
        assert relative(merged(given[None]).logits[0], want) < 1e-5


def test_each_answer_of_the_head_is_the_same(folder: Path) -> None:
    """One token, a few and many go different ways through the head; losses without gradient too."""
    ours, theirs, ids = ours_and_theirs(folder)
    theirs.eval()
    own = document(ids, 150)
    given = torch.from_numpy(own.ids.astype(np.int64))
    with torch.no_grad():
        hidden = ours.hidden(Pack.from_documents([own]))
        want = theirs(given[None]).logits[0]
        for rows in (slice(3, 4), slice(0, 9), slice(0, 150)):
            assert relative(ours.lm_head(hidden[rows]), want[rows]) < 1e-5
    ((loss, weight),) = ours.sequence_losses(Pack.from_documents([own]))
    sum_of_theirs = torch.nn.functional.cross_entropy(want[:-1], given[1:], reduction="sum")
    assert weight == 149
    assert loss == pytest.approx(float(sum_of_theirs), rel=1e-5)


def test_the_adapter_folder_is_what_peft_writes_and_opens_there(
    folder: Path, tmp_path: Path
) -> None:
    ours, theirs, ids = ours_and_theirs(folder)
    save_adapter(ours, LoraConfig(r=4, lora_alpha=12), str(folder), tmp_path / "ours")
    grown_tokenizer(folder)[0].save_pretrained(tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it saves the embedding: its base has it anyway
        theirs.save_pretrained(tmp_path / "theirs")
    saved, written = (
        load_file(tmp_path / side / "adapter_model.safetensors") for side in ("ours", "theirs")
    )
    # Of a base that was resized peft writes all that is below the embedding and the head as well.
    more = {key for key in written.keys() - saved.keys() if ".base_layer." not in key}
    assert not more or {key.split(".")[2] for key in more} == {"lm_head"}
    assert ours.config.tie_word_embeddings or not more
    assert all(torch.equal(value, written[key]) for key, value in saved.items())
    given = torch.from_numpy(document(ids).ids.astype(np.int64))[None]
    known = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if ours.config.vocab_size > known.config.vocab_size:
        known.resize_token_embeddings(ours.config.vocab_size, mean_resizing=False)
    opened = [PeftModel.from_pretrained(known, tmp_path / "ours")]
    opened += [AutoPeftModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)]
    with torch.no_grad():
        want = theirs.eval()(given).logits[0]
        for model in opened:
            got = model.eval()(given).logits[0]
            assert relative(got, want[:, : got.shape[1]]) < 1e-5


def test_a_model_that_is_trained_whole_grows_as_transformers_does(folder: Path) -> None:
    ours = load_causal_lm(folder, base_weights=None)
    new = grown_tokenizer(folder)[1]
    grow(ours, new)
    theirs, ids = resized(folder)
    own = document(ids)
    given = torch.from_numpy(own.ids.astype(np.int64))
    logits = theirs(given[None]).logits[0]
    loss = torch.nn.functional.cross_entropy(logits[:-1], given[1:], reduction="sum")
    loss.backward()
    total, _ = ours.loss(Pack.from_documents([own]))
    total.backward()
    assert relative(total.detach(), loss.detach()) < 1e-5
    their = dict(theirs.named_parameters())
    assert {name for name, _ in ours.named_parameters()} == their.keys()
    for name, parameter in ours.named_parameters():
        assert relative(parameter.grad, their[name].grad) < 1e-5, name
