"""The engine on a GPU against the same on the CPU; skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from llamaweft.adapters.lora import LoraConfig, inject, lora_layers
from llamaweft.data.chat import Document
from llamaweft.model.attention import PackAttention
from llamaweft.model.flash import attend_by_masks
from llamaweft.model.llama import LlamaForCausalLM, Memory
from llamaweft.model.load import load_causal_lm
from llamaweft.model.pack import Pack
from llamaweft.model.replay import KEEPABLE
from llamaweft.weights.codecs import decode
from llamaweft.weights.frozen import FrozenWeight, encode

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
CUDA = torch.device("cuda")


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    ours, theirs = ours.cpu().float(), theirs.cpu().float()
    return float((ours - theirs).norm() / theirs.norm())


def documents() -> list[Document]:
    random = np.random.default_rng(0)
    made = []
    for length in (90, 30, 61):
        weights = np.ones(length, np.float32)
        weights[: length // 2] = 0
        ids = random.integers(3, 900, length).astype(np.int32)
        made.append(Document(ids, weights, ""))
    return made


def adapted(folder: Path, device: torch.device, **more: object) -> LlamaForCausalLM:
    model = load_causal_lm(folder, base_weights="nf4", device=device, **more)  # type: ignore
    torch.manual_seed(1)
    inject(model, LoraConfig(r=4))
    generator = torch.Generator().manual_seed(2)
    for layer in lora_layers(model).values():
        for parameter in (layer.lora_A, layer.lora_B):
            value = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.data.copy_(value)
    return model


def gradients(model: LlamaForCausalLM) -> list[torch.Tensor]:
    total, _ = model.loss(Pack.from_documents(documents()).to(model.device))
    total.backward()
    return [p.grad for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("codec", ["nf4", "int8", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding_gives_the_cpus_numbers(codec: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    parts = encode(codec, torch.randn(200, 320))
    expected = decode(codec, parts, torch.float32).to(dtype)
    on_gpu = FrozenWeight(codec, (200, 320), parts).to(CUDA)
    assert relative(on_gpu.dequantised(dtype), expected) < 1e-6


@pytest.mark.parametrize("rows", [None, [3, 4, 5, 49, 50, 120]])
def test_variable_length_attention_is_masked_attention(rows: list[int] | None) -> None:
    pack = Pack.from_documents(documents())
    attend = PackAttention(pack, None if rows is None else torch.tensor(rows))
    queries = pack.tokens if rows is None else len(rows)
    torch.manual_seed(0)
    tensors = [torch.randn(n, h, 64) for n, h in ((queries, 8), (pack.tokens, 2), (pack.tokens, 2))]
    found = []
    for function in (lambda *t: attend(0, *t), lambda *t: attend_by_masks(*t, attend.pieces)):
        leaves = [t.to(CUDA, torch.bfloat16).requires_grad_() for t in tensors]
        out = function(*leaves)
        out.backward(torch.ones_like(out))
        found.append([out, *(leaf.grad for leaf in leaves)])
    for ours, theirs in zip(*found, strict=True):
        assert relative(ours, theirs) < 2e-2


def test_loss_and_gradients_are_the_cpus(tiny_folder: Path) -> None:
    expected = gradients(adapted(tiny_folder, torch.device("cpu")))
    for ours, theirs in zip(gradients(adapted(tiny_folder, CUDA)), expected, strict=True):
        assert relative(ours, theirs) < 1e-4


def test_layers_streamed_from_the_host_give_the_same_bits(tiny_folder: Path) -> None:
    resident = gradients(adapted(tiny_folder, CUDA))
    streamed = gradients(adapted(tiny_folder, CUDA, resident=False))
    assert all(torch.equal(a, b) for a, b in zip(resident, streamed, strict=True))


def test_kept_or_recomputed_the_bits_are_the_same(tiny_folder: Path) -> None:
    found = []
    for keep in (frozenset(KEEPABLE), frozenset()):
        model = adapted(tiny_folder, CUDA)
        model.model.memory = Memory([keep - {"attention"}] * 2, 32)
        found.append(gradients(model))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
