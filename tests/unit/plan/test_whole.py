"""The plan of what is trained whole: counts against built models, arithmetic by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from test_plan import WORK
from test_time import SPEED, STEP

from llamaweft.adapters.whole import WholeConfig, weighted_modules
from llamaweft.model.folder import read_config
from llamaweft.model.llama import empty_causal_lm
from llamaweft.model.load import load_causal_lm
from llamaweft.model.presets import PRESETS
from llamaweft.model.stores import store_bytes
from llamaweft.plan.flops import training_flops
from llamaweft.plan.memory import schedule, solve, trained_parameter_count
from llamaweft.plan.time import step_seconds
from llamaweft.plan.whole import Whole, whole_of

CONFIG = PRESETS["llama3-8b"]
LAYERS, HIDDEN, INNER, KEYS = 32, 4096, 14336, 1024
LINEARS = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * KEYS + 3 * HIDDEN * INNER


def whole(top_layers: int = 0, *modules: str, adapted: bool = False) -> Whole:
    names = weighted_modules(empty_causal_lm(CONFIG))
    return whole_of(CONFIG, WholeConfig(top_layers, modules).among(names, LAYERS, False), adapted)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "wanted", [WholeConfig(1, ("norm",)), WholeConfig(0, ("lm_head", "o_proj"))]
)
def test_what_is_counted_is_what_a_built_model_trains(
    tiny_folder: Path, tied_folder: Path, tied: bool, wanted: WholeConfig
) -> None:
    folder = tied_folder if tied else tiny_folder
    config = read_config(folder)
    names = wanted.among(weighted_modules(empty_causal_lm(config)), 2, tied)
    model = load_causal_lm(folder, base_weights="nf4", trained=names)
    built = [p.numel() for p in model.parameters() if p.requires_grad]
    found = whole_of(config, names, adapted=False)
    assert (found.parameters, found.largest) == (sum(built), max(built))
    work = replace(WORK, config=config, rank=None, targets=(), whole=found)
    assert trained_parameter_count(work) == sum(built)
    held = store_bytes(config, "nf4") - store_bytes(config, "nf4", without=names)
    assert held > 0


def test_layers_below_the_lowest_trained_one_keep_nothing() -> None:
    part = replace(WORK, rank=None, targets=(), whole=whole(2))
    found = solve(part, None)
    assert [bool(names) for names in found.keep] == [False] * 30 + [True] * 2
    assert found.recomputed_share == 0
    least = schedule(part, [()] * LAYERS)
    assert least.parts["activations"] == 2 * WORK.pack_tokens * HIDDEN * WORK.compute_bytes
    assert 0 < least.recomputed_share < 3 / LAYERS
    few = solve(part, (least.peak_bytes + found.peak_bytes) // 2)
    assert not any(few.keep[:30])
    assert any(few.keep[30:])
    assert replace(part, whole=whole(2, "embed_tokens")).lowest == 0


def test_gradients_and_moments_are_those_of_what_is_trained() -> None:
    part = replace(WORK, rank=None, targets=(), whole=whole(1))
    parts = schedule(part, [()] * LAYERS).parts
    trained = LINEARS + 2 * HIDDEN
    assert parts["trained"] == parts["gradients"] == 4 * trained
    assert parts["optimizer"] == 8 * trained


@pytest.mark.parametrize(
    ("changes", "largest"),
    [
        ({"rank": None, "targets": ()}, CONFIG.vocab_size * HIDDEN),
        ({}, 16 * (HIDDEN + INNER)),
        ({"pack_tokens": 2048}, 3 * 16 * (HIDDEN + INNER)),
        ({"rank": None, "targets": (), "whole": whole(1)}, INNER * HIDDEN),
        ({"whole": whole(0, "embed_tokens", adapted=True)}, CONFIG.vocab_size * HIDDEN),
    ],
)
def test_in_the_backward_pass_only_the_largest_gradients_are_held(
    changes: dict, largest: int
) -> None:
    work = replace(WORK, in_backward=True, accumulates=False, **changes)
    assert schedule(work, [()] * LAYERS).parts["gradients"] == 4 * largest


def test_the_flops_are_those_of_the_products_that_are_needed() -> None:
    """Counted product by product, for two top layers, their head, and the embedding."""
    tokens, labels, vocabulary = 100, 30, HIDDEN * CONFIG.vocab_size
    into = HIDDEN * (HIDDEN + 2 * KEYS)
    last = 2 * HIDDEN * KEYS * tokens + (LINEARS - 2 * HIDDEN * KEYS) * labels
    layers = {True: LINEARS * tokens, False: last}  # a layer, and the last one
    forward = 31 * layers[True] + layers[False] + vocabulary * labels
    input_gradient = layers[True] + layers[False] + vocabulary * labels - into * tokens
    weight_gradient = layers[True] + layers[False]
    found = training_flops(CONFIG, tokens, labels, frozen_base=True, whole=whole(2))
    assert found == 2 * (forward + input_gradient + weight_gradient)
    found = training_flops(CONFIG, tokens, labels, frozen_base=True, whole=whole(0, "lm_head"))
    assert found == 2 * (forward + vocabulary * labels)
    found = training_flops(CONFIG, tokens, labels, frozen_base=True, whole=whole(0, "embed_tokens"))
    assert found == 2 * 2 * forward


def test_a_step_takes_less_where_less_has_a_backward_pass() -> None:
    full = replace(WORK, rank=None, targets=())
    part = replace(full, whole=whole(2))
    least = [()] * LAYERS
    whole_seconds = step_seconds(full, schedule(full, least), STEP, SPEED)
    seconds = step_seconds(part, schedule(part, least), STEP, SPEED)
    assert seconds["attention"] / whole_seconds["attention"] == pytest.approx((2 + 5 / 16) / 7)
    assert seconds["calls"] / whole_seconds["calls"] == pytest.approx((1 + 2 / 16) / 3)
    assert seconds["products"] < whole_seconds["products"] / 2
