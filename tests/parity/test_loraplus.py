"""LoRA+: our learning rates against those of peft's create_loraplus_optimizer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from peft.optimizers import create_loraplus_optimizer
from transformers import AutoModelForCausalLM

from llamaweft.adapters.lora import LoraConfig, inject, loraplus_ratios
from llamaweft.model.load import load_causal_lm
from llamaweft.train.optim import build_optimizer, set_learning_rate, trained_parameters

RATE, RATIO = 3e-4, 16.0


def rates(optimizer: torch.optim.Optimizer, named: dict[str, torch.nn.Parameter]) -> dict:
    by_parameter = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    return {name: by_parameter[id(parameter)] for name, parameter in named.items()}


@pytest.mark.parametrize("dora", [False, True])
def test_the_rates_are_pefts(tiny_folder: Path, dora: bool) -> None:
    ours = load_causal_lm(tiny_folder, base_weights="fp32")
    inject(ours, LoraConfig(r=2, use_dora=dora))
    trained = trained_parameters(ours)
    optimizer = build_optimizer(
        "adamw",
        trained,
        weight_decay=0.1,
        betas=(0.9, 0.99),
        eps=1e-8,
        rate_ratios=loraplus_ratios(trained, RATIO),
    )
    set_learning_rate(optimizer, 1.0)
    set_learning_rate(optimizer, RATE)
    theirs = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32),
        PeftConfig(r=2, use_dora=dora, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    their_optimizer = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=RATE, loraplus_lr_ratio=RATIO
    )
    named = {
        name.removeprefix("base_model.model.").removesuffix(".default.weight"): parameter
        for name, parameter in theirs.named_parameters()
        if parameter.requires_grad
    }
    assert rates(optimizer, trained) == pytest.approx(rates(their_optimizer, named))
    decays = {p.ndim: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert decays == ({1: 0.0, 2: 0.1} if dora else {2: 0.1})


def test_without_a_ratio_all_learn_alike(tiny_folder: Path) -> None:
    model = load_causal_lm(tiny_folder, base_weights="fp32")
    inject(model, LoraConfig(r=2))
    trained = trained_parameters(model)
    optimizer = build_optimizer("adamw", trained, weight_decay=0.0, betas=(0.9, 0.99), eps=1e-8)
    set_learning_rate(optimizer, RATE)
    assert len(optimizer.param_groups) == 1
    assert set(rates(optimizer, trained).values()) == {RATE}
