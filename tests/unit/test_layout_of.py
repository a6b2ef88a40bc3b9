"""Which mesh the processes of a recipe get."""

from __future__ import annotations

import pytest
import torch

from llamaweft import layouts
from llamaweft.layouts import layout_of
from llamaweft.parallel.layout import Layout
from llamaweft.recipe import Recipe


@pytest.fixture
def recipe(recipe_tree: dict) -> Recipe:
    recipe_tree["training"] |= {
        "device": "auto",
        "gradient_accumulation_steps": 4,
        "memory_budget": "4GiB",
    }
    return Recipe.validate_tree(recipe_tree)


@pytest.fixture
def two_t4(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a machine with CUDA devices says of itself."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(layouts, "available_bytes", lambda device: 15 * 2**30)


def test_on_known_devices_the_fastest_by_their_data_sheet(recipe: Recipe, two_t4: None) -> None:
    layout, reason = layout_of(recipe, 2, 2)
    assert layout == Layout(data=2)
    assert "s a step by the plan, the least of 3 layouts that fit" in reason
    assert "4.00 GiB" in reason


def test_free_memory_is_the_devices_own(recipe: Recipe, two_t4: None) -> None:
    _, reason = layout_of(recipe.overridden({"training.memory_budget": "null"}), 2, 2)
    assert "15.00 GiB" in reason


def test_processes_on_a_cpu_take_the_first_that_fits(recipe: Recipe) -> None:
    layout, reason = layout_of(recipe.overridden({"training.device": "cpu"}), 2, 2)
    assert layout == Layout(data=2)
    assert "it is tried first" in reason


def test_a_layout_that_the_recipe_names_is_kept(recipe_tree: dict) -> None:
    recipe_tree["parallel"] = {"shard": 2}
    layout, reason = layout_of(Recipe.validate_tree(recipe_tree), 2, 2)
    assert layout == Layout(shard=2)
    assert "as the recipe says" in reason
