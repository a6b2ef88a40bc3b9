"""KL and loss against transformers' full logits and torch's own functions.

There is no gradient to compare: the measure has none.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from llamaweft.adapters.lora import LoraConfig, inject, lora_layers
from llamaweft.data.general import General, general_prompts, read_general
from llamaweft.model.divergence import Compared, Reference
from llamaweft.model.load import load_causal_lm
from llamaweft.model.pack import Pack

TOLERANCE = 1e-5
"""Relative: two implementations in fp32, summed in another order."""


def general_of(tokenizer) -> General:
    return read_general(general_prompts(6), tokenizer)


def reference_of(model, general: General) -> Reference:
    packs = [Pack.from_documents(batch, share=True) for batch in general.batches(200)]
    return Reference(model, packs)


@torch.no_grad()
def by_transformers(base, tuned, general: General) -> list[Compared]:
    found = []
    for document in general.documents:
        ids = torch.from_numpy(document.ids.astype("int64"))
        labels = torch.from_numpy(document.weights).nonzero().flatten()
        old, new = (
            m(ids[None]).logits[0, labels - 1].double().log_softmax(-1) for m in (base, tuned)
        )
        kl = F.kl_div(new, old, log_target=True, reduction="sum").item()
        before, after = (F.nll_loss(p, ids[labels], reduction="sum").item() for p in (old, new))
        found.append(Compared(kl, before, after, len(labels)))
    return found


def assert_same(ours: list[Compared], theirs: list[Compared]) -> None:
    assert len(ours) == len(theirs) == 6
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.labels == other.labels
        assert mine.kl / mine.labels == pytest.approx(other.kl / mine.labels, rel=TOLERANCE)
        assert mine.before == pytest.approx(other.before, rel=TOLERANCE)
        assert mine.after == pytest.approx(other.after, rel=TOLERANCE)
    assert min(row.kl / row.labels for row in theirs) > 0.005


def test_with_an_adapter(tiny_folder: Path, tokenizer) -> None:
    model = load_causal_lm(tiny_folder, base_weights="fp32")
    inject(model, LoraConfig(r=4))
    general = general_of(tokenizer)
    reference = reference_of(model, general)
    torch.manual_seed(0)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.3)
    base, tuned = (AutoModelForCausalLM.from_pretrained(tiny_folder).eval() for _ in range(2))
    for name, layer in lora_layers(model).items():
        tuned.get_parameter(f"{name}.weight").data.copy_(layer.merged())
    assert_same(reference.compare(model), by_transformers(base, tuned, general))


def test_where_every_weight_is_trained_the_head_included(tiny_folder: Path, tokenizer) -> None:
    model = load_causal_lm(tiny_folder, base_weights=None)
    general = general_of(tokenizer)
    reference = reference_of(model, general)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.6 * parameter.std() * torch.randn_like(parameter))
    base, tuned = (AutoModelForCausalLM.from_pretrained(tiny_folder).eval() for _ in range(2))
    tuned.load_state_dict(dict(model.state_dict()))
    assert_same(reference.compare(model), by_transformers(base, tuned, general))
