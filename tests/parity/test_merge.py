"""An adapter that was trained on rounded weights, merged into the original ones, as peft does it
that opens the original base. Tolerance 2e-6: fp32 sums of numbers up to 1."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from llamaweft.adapters.folder import save_adapter
from llamaweft.adapters.lora import LoraConfig, inject, lora_layers, start_pissa
from llamaweft.export.hf import merged_tensors
from llamaweft.export.originals import hold_originals, originals
from llamaweft.model.load import load_causal_lm


@pytest.mark.parametrize(
    ("codec", "config"),
    [
        ("nf4", LoraConfig(r=4, lora_alpha=8)),
        ("int8", LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=("q_proj", "down_proj"))),
        ("nf4", LoraConfig(r=4, lora_alpha=8, use_dora=True)),
        ("bf16", LoraConfig(r=4, lora_alpha=8, init_lora_weights="pissa")),
    ],
    ids=["lora", "rslora", "dora", "pissa"],
)  # fmt: skip
def test_a_merge_into_the_originals_is_pefts(
    tiny_folder: Path, tmp_path: Path, codec: str, config: LoraConfig
) -> None:
    torch.manual_seed(6)
    model = load_causal_lm(tiny_folder, base_weights=codec)
    inject(model, config)
    if config.is_pissa:
        start_pissa(model, config, lambda what: None)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B.add_(torch.randn_like(layer.lora_B) * 0.05)
    save_adapter(model, config, str(tiny_folder), tmp_path / "adapter")
    hold_originals(model, originals(tiny_folder))
    ours = dict(merged_tensors(model))

    base = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    merged = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    theirs = merged.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=2e-6, msg=name)
