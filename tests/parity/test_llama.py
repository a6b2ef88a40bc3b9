"""Our Llama against transformers' LlamaForCausalLM: logits, and gradients of every parameter.

Tolerance 1e-5 of the norm in fp32 for random tiny models: the order of summation differs. For
the embedded model 5e-5: transformers' own two attention paths differ by 1.5e-5 there.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from llamaweft.adapters.lora import LoraConfig, inject, lora_layers
from llamaweft.data.chat import Document
from llamaweft.model.builtin import builtin_folder
from llamaweft.model.llama import Memory
from llamaweft.model.load import load_causal_lm
from llamaweft.model.pack import Pack
from llamaweft.model.replay import KEEPABLE

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
SHAPES = {
    "grouped_queries": {},
    "tied": {"tie_word_embeddings": True},
    "llama3_rope": {"rope_parameters": LLAMA3},
    "linear_rope": {
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    },
    "wide_heads": {"head_dim": 32, "num_key_value_heads": 4},
}


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm().clamp_min(1e-12))


def documents(vocabulary: int, lengths: tuple[int, ...]) -> list[Document]:
    random = np.random.default_rng(0)
    made = []
    for length in lengths:
        ids = random.integers(0, vocabulary, length).astype(np.int32)
        weights = (random.random(length) < 0.5).astype(np.float32)
        weights[-1] = 1
        made.append(Document(ids, weights, ""))
    return made


def their_loss(model: torch.nn.Module, document: Document) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and summed loss of one document alone, by transformers and plain cross-entropy."""
    ids = torch.from_numpy(document.ids.astype(np.int64))
    logits = model(ids[None]).logits[0]
    each = torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none")
    return logits, (each * torch.from_numpy(document.weights[1:])).sum()


def compare(folder: Path, lengths: tuple[int, ...], tolerance: float) -> None:
    ours = load_causal_lm(folder, base_weights=None)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    made = documents(ours.config.vocab_size, lengths)
    pack = Pack.from_documents(made)
    their_logits, their_sums = zip(*(their_loss(theirs, d) for d in made), strict=True)
    with torch.no_grad():
        assert relative(ours(pack), torch.cat(their_logits)) < tolerance
    total, count = ours.loss(pack)
    assert float(count) == sum(d.weights[1:].sum() for d in made)
    assert relative(total, sum(their_sums)) < tolerance
    total.backward()
    sum(their_sums).backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    assert gradients.keys() == {name for name, _ in ours.named_parameters()}
    for name, parameter in ours.named_parameters():
        difference = relative(parameter.grad, gradients[name])
        assert difference < tolerance, f"{name}: {difference}"


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_gradients_on_random_tiny_models(shape: str, tmp_path: Path) -> None:
    config = LlamaConfig(
        **{
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 160,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            **SHAPES[shape],
        }
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    compare(tmp_path, (70, 5, 33), 1e-5)


def test_logits_and_gradients_of_the_embedded_model() -> None:
    # oneDNN and MKL sum in another order.
    compare(builtin_folder("builtin:smollm2-135m"), (40, 9), 1e-4)


def gradients(folder: Path, keep: frozenset[str], tile: int, adapted: bool) -> list[torch.Tensor]:
    model = load_causal_lm(folder, base_weights="nf4" if adapted else None)
    if adapted:
        torch.manual_seed(4)
        inject(model, LoraConfig(r=4, lora_dropout=0.1))
        for layer in lora_layers(model).values():
            torch.nn.init.normal_(layer.lora_B, std=0.1)
    model.train()
    model.model.memory = Memory([keep] * 2, tile)
    torch.manual_seed(5)
    total, _ = model.loss(Pack.from_documents(documents(1000, (50, 20))))
    total.backward()
    return [p.grad for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("adapted", [False, True])
def test_kept_or_recomputed_the_bits_are_the_same(tiny_folder: Path, adapted: bool) -> None:
    everything = gradients(tiny_folder, frozenset(KEEPABLE), 32, adapted)
    assert len(everything) == (28 if adapted else 21)
    for names in [set(), {"mid"}, {"mid", "gate_proj", "k_proj"}, {"attention", "q_proj"}]:
        for kept, again in zip(
            everything, gradients(tiny_folder, frozenset(names), 32, adapted), strict=True
        ):
            assert torch.equal(kept, again), names
