"""The whole engine, frozen weights in a codec and packs of documents, against transformers + peft
with the same decoded weights: loss and gradients, 1e-4 of the norm for each tensor (fp32, order of
summation)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers import LlamaConfig as TheirConfig

from llamaweft.adapters.folder import adapter_state, load_adapter_state
from llamaweft.adapters.lora import LAYER_LINEARS, LoraConfig, inject
from llamaweft.data.chat import Document
from llamaweft.export.hf import merged_tensors
from llamaweft.model.llama import Memory
from llamaweft.model.load import load_causal_lm
from llamaweft.model.pack import Pack

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers, wide enough for several tiles of products and of the vocabulary."""
    path = tmp_path_factory.mktemp("models") / "wide"
    torch.manual_seed(0)
    config = TheirConfig(
        vocab_size=1500,
        hidden_size=640,
        intermediate_size=1344,
        num_hidden_layers=3,
        num_attention_heads=10,
        num_key_value_heads=5,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def documents() -> list[Document]:
    """Lengths and labels as in chats: a prompt without, an answer with, some turns between."""
    random = np.random.default_rng(1)
    made = []
    for length, trained in [(150, [(60, 150)]), (40, [(10, 20), (30, 40)]), (7, [(6, 7)])]:
        weights = np.zeros(length, np.float32)
        for start, stop in trained:
            weights[start:stop] = 1
        ids = random.integers(3, 1500, length).astype(np.int32)
        made.append(Document(ids, weights, ""))
    return made


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("codec", ["nf4", "int8", "bf16", "fp32"])
@pytest.mark.parametrize("targets", [LAYER_LINEARS, ("v_proj",)], ids=["all", "v_proj"])
def test_loss_and_gradients(folder: Path, codec: str, targets: tuple[str, ...]) -> None:
    ours = load_causal_lm(folder, base_weights=codec)
    decoded = dict(merged_tensors(ours))
    inject(ours, LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    base.load_state_dict(decoded)
    theirs = get_peft_model(
        base,
        PeftConfig(r=4, lora_alpha=8, target_modules=list(targets), task_type="CAUSAL_LM"),
    )
    torch.manual_seed(3)
    state = {name: torch.randn(t.shape) * 0.1 for name, t in adapter_state(ours).items()}
    load_adapter_state(ours, state, "test")
    named = dict(theirs.named_parameters())
    for name, value in state.items():
        named[name.replace(".weight", ".default.weight")].data.copy_(value)

    made = documents()
    expected = torch.zeros(())
    for document in made:
        ids = torch.from_numpy(document.ids.astype(np.int64))
        logits = theirs(ids[None]).logits[0]
        each = torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none")
        expected = expected + (each * torch.from_numpy(document.weights[1:])).sum()
    expected.backward()

    for keep in (frozenset(), frozenset({"mid", "up_proj", "attention"})):
        ours.model.memory = Memory([keep] * 3, mlp_tile_tokens=64)
        ours.zero_grad()
        total, _ = ours.loss(Pack.from_documents(made))
        total.backward()
        assert relative(total.detach(), expected.detach()) < TOLERANCE
        for name, parameter in ours.named_parameters():
            if parameter.requires_grad:
                their = named[f"base_model.model.{name}.default.weight"]
                assert relative(parameter.grad, their.grad) < TOLERANCE, name


def test_layers_below_the_lowest_trained_one_have_no_backward_pass(folder: Path) -> None:
    model = load_causal_lm(folder, base_weights="nf4")
    inject(model, LoraConfig(r=2, target_modules=("layers.2.self_attn.q_proj",)))
    asked: list[tuple[int, int]] = []
    model.model.stream.before = lambda layer, step: asked.append((layer, step))  # type: ignore
    total, _ = model.loss(Pack.from_documents(documents()))
    total.backward()
    backward = {layer for layer, step in asked if step < 0}
    assert backward == {2}


def test_kept_in_bf16_is_close_and_not_the_same(folder: Path) -> None:
    grads = []
    for dtype in (None, torch.bfloat16):
        model = load_causal_lm(folder, base_weights="nf4")
        torch.manual_seed(6)
        inject(model, LoraConfig(r=2))
        torch.nn.init.ones_(model.model.layers[0].mlp.up_proj.lora_B)
        model.model.memory = Memory([frozenset({"gate_proj", "up_proj"})] * 3, keep_dtype=dtype)
        total, _ = model.loss(Pack.from_documents(documents()))
        total.backward()
        grads.append(model.model.layers[0].mlp.up_proj.lora_A.grad)
    assert 0 < relative(grads[1], grads[0]) < 2e-2
