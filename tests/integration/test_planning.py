"""Plans of whole recipes: the nearest that fits, where none does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from llamaweft.errors import UserError
from llamaweft.pieces import fitted
from llamaweft.pieces import pieces as pieces_module
from llamaweft.pieces.pieces import Pieces
from llamaweft.plan.memory import schedule
from llamaweft.planning import nearest_fit, plan_run
from llamaweft.recipe import Recipe
from llamaweft.weights.matmul import kernel_bytes


def least_bytes(pieces: Pieces) -> int:
    layers = pieces.config.num_hidden_layers
    return schedule(pieces.workload, [()] * layers).peak_bytes


def test_the_nearest_recipe_that_fits_is_named(recipe_tree: dict, monkeypatch) -> None:
    monkeypatch.setattr(fitted, "anon_bytes", lambda: 2**28)  # or it grows by what tests load
    recipe_tree["training"] |= {"micro_batch_tokens": 1024, "max_steps": 50}
    large = Pieces(Recipe.validate_tree(recipe_tree))
    small = large.changed({"training.micro_batch_tokens": "256"})
    budget = (least_bytes(large) + least_bytes(small)) // 2
    assert least_bytes(small) < budget < least_bytes(large)
    tight = large.changed({"training.memory_budget": str(budget)})
    changes = nearest_fit(tight)
    assert changes.startswith("training.micro_batch_tokens=")
    with pytest.raises(UserError, match=f"it fits with {changes}"):
        plan_run(tight)
    fitting = tight.changed(dict([changes.split("=")]))
    assert plan_run(fitting).fits


def test_bf16_on_a_cpu_counts_the_kernels_of_its_products(recipe_tree: dict, monkeypatch) -> None:
    monkeypatch.setattr(fitted, "anon_bytes", lambda: 0)
    found = {}
    for dtype in ("fp32", "bf16"):
        recipe_tree["training"]["compute_dtype"] = dtype
        found[dtype] = Pieces(Recipe.validate_tree(recipe_tree)).workload
    kernels = kernel_bytes(torch.bfloat16, found["bf16"].pack_tokens)
    assert kernels > 10 * 2**20
    assert found["bf16"].runtime_bytes - found["fp32"].runtime_bytes == kernels


def test_small_tensors_are_given_back_where_memory_is_short(recipe_tree: dict, monkeypatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(pieces_module, "return_freed_memory", lambda: told.append("return"))
    monkeypatch.setattr(pieces_module, "keep_freed_memory", lambda: told.append("keep"))
    pieces = Pieces(Recipe.validate_tree(recipe_tree))
    assert not pieces.workload.large_tensors
    for is_short in (False, True):
        pieces.schedule = replace(pieces.schedule, returns_freed=is_short)
        pieces.settle_memory()
        assert told == (["return"] if is_short else [])
