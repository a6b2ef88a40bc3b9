"""The plan's arithmetic: counts against built models, schedules against budgets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llamaweft.adapters.lora import LAYER_LINEARS, LoraConfig, inject
from llamaweft.errors import UserError
from llamaweft.model.load import load_causal_lm
from llamaweft.model.presets import PRESETS, parameter_count
from llamaweft.plan.flops import training_flops
from llamaweft.plan.hardware import available_bytes, matmul_flops_per_second
from llamaweft.plan.memory import Workload, adapter_parameters, schedule, solve

WORK = Workload(
    config=PRESETS["llama3-8b"],
    pack_tokens=2048,
    labels=1000,
    rank=16,
    targets=LAYER_LINEARS,
    frozen_bytes=2,
    compute_bytes=2,
)


def test_the_8b_needs_29_gflop_a_token() -> None:
    """The design's figure: forward and the gradient of the input, every position labelled."""
    flops = training_flops(PRESETS["llama3-8b"], 1, 1, frozen_base=True)
    assert flops == pytest.approx(30e9, rel=0.05)
    assert training_flops(PRESETS["llama3-8b"], 1, 1, frozen_base=False) == 1.5 * flops


def test_adapter_parameters_are_those_of_a_built_model(tiny_folder: Path) -> None:
    model = load_causal_lm(tiny_folder, frozen_dtype=torch.float32)
    for targets in (LAYER_LINEARS, ("q_proj", "down_proj")):
        config = LoraConfig(r=3, target_modules=targets)
        model = load_causal_lm(tiny_folder, frozen_dtype=torch.float32)
        inject(model, config)
        built = sum(p.numel() for p in model.parameters() if p.requires_grad)
        work = replace(WORK, config=model.config, rank=3, targets=targets)
        assert adapter_parameters(work) == built
    assert parameter_count(model.config) == sum(
        p.numel() for p in load_causal_lm(tiny_folder, frozen_dtype=None).parameters()
    )


def test_recomputing_more_layers_needs_less() -> None:
    peaks = [schedule(WORK, n).peak_bytes for n in range(1, 33)]
    assert peaks == sorted(peaks, reverse=True)


def test_the_schedule_fits_with_the_least_recomputation() -> None:
    free = solve(WORK, None)
    assert free.recompute_layers == 0
    budget = free.peak_bytes - 2**30
    found = solve(WORK, budget)
    assert found.peak_bytes <= budget < schedule(WORK, found.recompute_layers - 1).peak_bytes


def test_a_budget_that_nothing_fits_names_the_smallest_that_does() -> None:
    with pytest.raises(UserError) as caught:
        solve(WORK, 2**30)
    smallest = float(str(caught.value).partition("works is ")[2].partition("GiB")[0])
    assert solve(WORK, int(smallest * 2**30)).recompute_layers == 32


def test_the_machine_is_measured() -> None:
    assert available_bytes(torch.device("cpu")) > 2**28
    rate = matmul_flops_per_second(torch.device("cpu"), torch.float32, (256, 256, 256), 0.1)
    assert 1e8 < rate < 1e16
