"""The plan's arithmetic: counts against built models, schedules against budgets."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llamaweft.adapters.lora import LAYER_LINEARS, LoraConfig, inject
from llamaweft.errors import UserError
from llamaweft.model.load import load_causal_lm
from llamaweft.model.presets import PRESETS, parameter_count
from llamaweft.plan import hardware
from llamaweft.plan.flops import training_flops
from llamaweft.plan.hardware import available_bytes, matmul_flops_per_second
from llamaweft.plan.memory import Schedule, Workload, adapter_parameters, schedule, solve

WORK = Workload(
    config=PRESETS["llama3-8b"],
    pack_tokens=1024,
    labels=600,
    rank=16,
    targets=LAYER_LINEARS,
    compute_bytes=4,
    runtime_bytes=600 * 2**20,
)


def test_the_flops_are_those_of_the_products_that_are_needed() -> None:
    """Counted product by product: [rows, in, out] forward, and again where a gradient goes on."""
    config = PRESETS["llama3-8b"]
    tokens, labels, e, f, kv = 100, 30, 4096, 14336, 1024
    attention, mlp = [(e, e), (e, kv), (e, kv), (e, e)], [(e, f), (e, f), (f, e)]
    inner = sum(a * b for a, b in attention + mlp)
    forward = 31 * tokens * inner + tokens * 2 * e * kv
    forward += labels * (inner - 2 * e * kv + e * config.vocab_size)
    not_back = tokens * (e * e + 2 * e * kv)  # into the frozen embedding, below the first layer
    flops = training_flops(config, tokens, labels, frozen_base=True)
    assert flops == 2 * (2 * forward - not_back)
    assert training_flops(config, tokens, labels, frozen_base=False) == 2 * 3 * forward


def test_adapter_parameters_are_those_of_a_built_model(tiny_folder: Path) -> None:
    model = load_causal_lm(tiny_folder, base_weights="fp32")
    for targets in (LAYER_LINEARS, ("q_proj", "down_proj")):
        config = LoraConfig(r=3, target_modules=targets)
        model = load_causal_lm(tiny_folder, base_weights="fp32")
        inject(model, config)
        built = sum(p.numel() for p in model.parameters() if p.requires_grad)
        work = replace(WORK, config=model.config, rank=3, targets=targets)
        assert adapter_parameters(work) == built
        model = load_causal_lm(tiny_folder, base_weights="fp32")
        inject(model, replace(config, use_dora=True))
        built = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert adapter_parameters(replace(work, magnitudes=True)) == built
    assert parameter_count(model.config) == sum(
        p.numel() for p in load_causal_lm(tiny_folder, base_weights=None).parameters()
    )


def test_with_enough_memory_nothing_is_recomputed() -> None:
    free = solve(WORK, None)
    assert free.recomputed_share == 0
    assert solve(WORK, free.peak_bytes) == free
    less = solve(WORK, free.peak_bytes - 2**30)
    assert less.recomputed_share > 0
    assert less.peak_bytes <= free.peak_bytes - 2**30


@pytest.mark.parametrize("fragment_bytes", [0, 2**27, 2**30])
def test_more_memory_means_less_recomputation_and_every_schedule_fits(fragment_bytes: int) -> None:
    """Fragments grow with what is kept."""
    budgets = [int(gib * 2**30) for gib in (2.5, 3, 4, 5, 6, 7)]
    found = [solve(replace(WORK, fragment_bytes=fragment_bytes), budget) for budget in budgets]
    assert all(s.peak_bytes > b - 2**26 for s, b in zip(found[:-1], budgets[:-1], strict=True))
    assert all(s.peak_bytes <= b for s, b in zip(found, budgets, strict=True))
    assert all(s.returns_freed for s in found[:-1])
    assert Schedule.from_dict(found[0].to_dict()) == found[0]
    assert not solve(WORK, None).returns_freed
    shares = [s.recomputed_share for s in found]
    assert shares == sorted(shares, reverse=True)
    assert len(set(shares)) == len(shares)


def test_magnitudes_need_the_outputs_of_the_last_products() -> None:
    plain, dora = WORK, replace(WORK, magnitudes=True)
    e, f = 4096, 14336
    assert dora.keepable == ("down_proj", "o_proj", *plain.keepable[1:])
    free = solve(dora, None)
    assert free.recomputed_share == 0
    last = min(WORK.labels, WORK.pack_tokens)
    more = 4 * e * (31 * WORK.pack_tokens + last)  # o_proj is kept in the place of mid
    assert free.parts["activations"] - solve(plain, None).parts["activations"] == more
    least, least_plain = schedule(dora, [()] * 32), schedule(plain, [()] * 32)
    assert least.recomputed_share == 1 > least_plain.recomputed_share
    outputs = 2 * e + 2 * 1024 + 2 * f + e  # q, o; k, v; gate, up; down
    assert least.parts["trained"] - least_plain.parts["trained"] == 4 * 32 * outputs
    assert least.parts["optimizer"] - least_plain.parts["optimizer"] == 8 * 32 * outputs
    assert least.parts["weights"] - least_plain.parts["weights"] == 12 * 32 * outputs
    assert least.parts["workspace"] > least_plain.parts["workspace"]
    only = replace(dora, targets=("q_proj",))
    assert only.keepable == plain.keepable
    assert schedule(only, [()] * 32).recomputed_share == least_plain.recomputed_share


def test_where_pissa_starts_is_held_and_finding_it_takes_memory_for_a_moment() -> None:
    plain, pissa = WORK, replace(WORK, keeps_start=True)
    one, two = schedule(plain, [()] * 32), schedule(pissa, [()] * 32)
    pairs = adapter_parameters(plain)
    assert adapter_parameters(pissa) == pairs
    assert two.parts == one.parts | {"weights": one.parts["weights"] + 4 * pairs}
    of_a_step = ("gradients", "optimizer", "activations", "workspace")
    least = sum(two.parts[name] for name in of_a_step)
    assert solve(replace(pissa, start_bytes=least), two.peak_bytes).peak_bytes == two.peak_bytes
    larger = replace(pissa, start_bytes=least + 2**30)
    assert schedule(larger, [()] * 32).peak_bytes == two.peak_bytes + 2**30
    with pytest.raises(UserError, match="too small"):
        solve(larger, two.peak_bytes)
    found = solve(larger, two.peak_bytes + 2**30)  # what the start took is free in a step
    assert found.keep == solve(pissa, two.peak_bytes + 2**30).keep != ((),) * 32
    assert found.peak_bytes <= two.peak_bytes + 2**30


def test_the_down_projection_is_never_done_again() -> None:
    least = schedule(WORK, [()] * 32)
    e, f, kv = 4096, 14336, 1024
    rest = 1024 * (2 * e * e + 2 * e * kv + 2 * e * f)
    last = 600 * (2 * e * e + 2 * e * f) + 1024 * 2 * e * kv
    again = 31 * rest + last
    assert least.recomputed_share == pytest.approx(
        again / (again + 31 * 1024 * e * f + 600 * e * f)
    )


def test_a_budget_that_nothing_fits_names_the_smallest_that_does() -> None:
    with pytest.raises(UserError) as caught:
        solve(WORK, 2**30)
    smallest = float(str(caught.value).partition("works is ")[2].partition("GiB")[0])
    assert solve(WORK, int(smallest * 2**30)).keep[0] == ()


@pytest.mark.parametrize("large_tensors", [False, True])
@pytest.mark.parametrize("layers", [1, 2, 4, 8])
@pytest.mark.parametrize("preset", ["llama3-8b", "llama3.2-1b", "tiny"])
def test_the_smallest_that_works_is_the_smallest_of_all_schedules(
    preset: str, layers: int, large_tensors: bool
) -> None:
    """Of few layers, keeping what all need spares more workspace than it takes."""
    config = replace(PRESETS[preset], num_hidden_layers=layers)
    work = replace(WORK, config=config, fragment_bytes=2**27, large_tensors=large_tensors)
    peaks = [
        solve(work, None).peak_bytes,
        schedule(work, [work.keepable] * layers, 1024).peak_bytes,
    ]
    for is_kept in itertools.product((False, True), repeat=len(work.keepable)):
        keep = tuple(itertools.compress(work.keepable, is_kept))
        peaks.append(schedule(work, [keep] * layers).peak_bytes)
    smallest = min(peaks)
    assert solve(work, smallest).peak_bytes == smallest
    with pytest.raises(UserError, match=f"works is {math.ceil(smallest * 100 / 2**30) / 100:.2f}G"):
        solve(work, smallest - 1)


def test_kept_in_bf16_takes_half() -> None:
    whole, half = solve(WORK, None), solve(replace(WORK, kept_bytes=2), None)
    fixed = 32 * 1024 * 4096 * 4 * 3 + 31 * 1024 * 128 + 600 * 128  # inputs, mid, attention
    fixed -= 2 * 424 * 4096 * 4
    assert half.parts["activations"] - fixed == (whole.parts["activations"] - fixed) // 2


@pytest.mark.parametrize("version", [1, 2])
def test_a_control_groups_limit_bounds_what_is_free(version, tmp_path: Path, monkeypatch) -> None:
    """The outer group's limit counts too, and page cache does not."""
    root = tmp_path / ("memory" if version == 1 else "")
    limit, held = [("memory.limit_in_bytes", "total_rss"), ("memory.max", "anon")][version - 1]
    for group, most in ((root / "outer", 5 * 2**20), (root / "outer/inner", 2**30)):
        group.mkdir(parents=True)
        (group / limit).write_text(f"{most}\n")
        (group / "memory.stat").write_text(f"cache 123456789\n{held} {2**20}\n")
    (root / limit).write_text("max\n")
    own = tmp_path / "own"
    own.write_text(f"3:cpu:/\n{'2:memory' if version == 1 else '0:'}:/outer/inner\n")
    monkeypatch.setattr(hardware, "CGROUPS", tmp_path)
    monkeypatch.setattr(hardware, "OWN_GROUPS", own)
    assert available_bytes(torch.device("cpu")) == 4 * 2**20


def test_the_machine_is_measured() -> None:
    assert available_bytes(torch.device("cpu")) > 2**28
    rate = matmul_flops_per_second(torch.device("cpu"), torch.float32, (256, 256, 256), 0.1)
    assert 1e8 < rate < 1e16
