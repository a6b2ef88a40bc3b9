"""Seconds of a step: each kind of work by its own rate, counted by hand."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from test_plan import WORK

from llamaweft.errors import UserError
from llamaweft.plan.devices import DEVICES, find_device
from llamaweft.plan.flops import training_flops
from llamaweft.plan.memory import schedule, solve
from llamaweft.plan.plan import make_plan
from llamaweft.plan.time import Speed, StepWork, step_seconds

CONFIG = WORK.config
STEP = StepWork(tokens=1000, labels=500, squares=300_000)
SPEED = Speed(150e9, 200e9, 20e9, 0.01, "made up", measured=False)


def test_products_take_their_flops_and_what_is_done_again() -> None:
    flops = training_flops(CONFIG, 1000, 500, frozen_base=True)
    once = step_seconds(WORK, solve(WORK, None), STEP, SPEED)
    assert once["products"] == pytest.approx(flops / 150e9)
    least = schedule(WORK, [()] * 32)
    again = step_seconds(WORK, least, STEP, SPEED)
    assert again["products"] / once["products"] == pytest.approx(1 + least.recomputed_share / 2)
    assert {k: v for k, v in again.items() if k != "products"} == {
        k: v for k, v in once.items() if k != "products"
    }


def test_attention_and_adapter_by_hand() -> None:
    found = step_seconds(WORK, solve(WORK, None), STEP, SPEED)
    assert found["calls"] == pytest.approx(0.32)
    # Two products forward and five backward, each 2 L^2 of the width of all heads, half of it.
    assert found["attention"] == pytest.approx(32 * 7 * 300_000 * 4096 / (0.4 * 200e9))
    inputs = 4 * 4096 + 2 * 4096 + 14336  # q k v o, gate up, down
    outputs = 4096 + 1024 + 1024 + 4096 + 2 * 14336 + 4096
    narrow = 32 * 2 * 1000 * 16 * (4 * inputs + 3 * outputs)
    assert found["adapter"] == pytest.approx(narrow / (0.5 * 200e9))
    pissa = step_seconds(replace(WORK, keeps_start=True), solve(WORK, None), STEP, SPEED)
    narrow = 32 * 2 * 1000 * 16 * (7 * inputs + 5 * outputs)
    assert pissa["adapter"] == pytest.approx(narrow / (0.5 * 200e9))


@dataclass(frozen=True)
class Layer:
    tokens: int = 500
    squares: int = 150_000
    kept: float = 2.0
    recomputed: float = 3.0
    label: float = 0.01


def test_a_step_is_so_many_layers_as_the_one_that_was_run() -> None:
    """All 32 layers but for what the last one leaves out (queries, output and MLP of tokens without
    a label) and for the gradient of the first one's input, by their FLOPs; twice the tokens."""
    speed = replace(SPEED, layer=Layer())
    found = step_seconds(WORK, solve(WORK, None), STEP, speed)
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336
    keys = 2 * 4096 * 1024
    forward = 31 * layer + keys + 0.5 * (layer - keys)
    first = 4096 * 4096 + keys
    assert found["layers"] == pytest.approx((2 * forward - first) / (2 * layer) * 2 * 2.0)
    assert found["head"] == pytest.approx(500 * 0.01)
    assert found["recomputation"] == 0
    assert found["longer documents"] == 0


def test_what_is_recomputed_takes_its_share_of_what_keeping_nothing_takes_more() -> None:
    speed = replace(SPEED, layer=Layer())
    least, all_kept = schedule(WORK, [()] * 32), solve(WORK, None)
    none, once = (step_seconds(WORK, made, STEP, speed) for made in (least, all_kept))
    assert none["recomputation"] == pytest.approx(0.5 * once["layers"])  # 3 seconds instead of 2
    half = schedule(WORK, [WORK.keepable] * 16 + [()] * 16)
    some = step_seconds(WORK, half, STEP, speed)["recomputation"]
    assert some == pytest.approx(
        none["recomputation"] * half.recomputed_share / least.recomputed_share
    )


def test_longer_documents_than_were_run_take_more_attention() -> None:
    """Squares of 2 x 150,000 were run; the rest is counted."""
    speed = replace(SPEED, layer=Layer())
    long = replace(STEP, squares=1_000_000)
    found = step_seconds(WORK, solve(WORK, None), long, speed)
    assert found["longer documents"] == pytest.approx(32 * 7 * 700_000 * 4096 / (0.4 * 200e9))


def test_without_an_adapter_nothing_is_narrow_and_the_optimizer_takes_longer() -> None:
    adapter = step_seconds(WORK, solve(WORK, None), STEP, SPEED)
    whole = replace(WORK, rank=None, targets=())
    full = step_seconds(whole, schedule(whole, [()] * 32), STEP, SPEED)
    assert full["adapter"] == 0
    assert full["optimizer"] > 100 * adapter["optimizer"]


def plan(**more):
    return make_plan(
        WORK,
        solve(WORK, None),
        STEP,
        SPEED,
        steps=300,
        given_tokens=1200,
        packs_per_epoch=300,
        budget_bytes=2**34,
        decisions={},
        **more,
    )


def test_a_plan_counts_tokens_as_given_and_costs_by_the_hour() -> None:
    made = plan(price_per_hour=0.5)
    assert (made.tokens, made.computed_tokens) == (360_000, 300_000)
    assert made.total_seconds == pytest.approx(300 * sum(made.seconds.values()))
    assert made.tokens_per_second == pytest.approx(360_000 / made.total_seconds)
    assert made.cost == pytest.approx(made.total_seconds / 3600 * 0.5)
    assert plan().cost is None


def test_a_long_run_is_said_in_words() -> None:
    (long,) = plan().warnings
    assert "hours" in long
    assert "training.max_seconds" in long
    stopped = plan(max_seconds=3600).warnings
    assert len(stopped) == 2
    assert "of 300 steps" in stopped[1]


def test_devices_are_found_in_any_case_and_unknown_ones_name_the_known() -> None:
    assert find_device("H100") is DEVICES["h100"]
    with pytest.raises(UserError, match="rtx4090"):
        find_device("h1000")
