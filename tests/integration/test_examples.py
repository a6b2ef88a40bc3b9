"""The examples run, and the recipes of the repository are valid."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from llamaweft.recipe import Recipe

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("path", sorted(ROOT.rglob("recipes/*.yaml")), ids=lambda p: p.name)
def test_recipes_are_valid(path: Path) -> None:
    recipe = Recipe.load(path)
    assert f"llamaweft train recipes/{path.name}" in path.read_text(encoding="utf-8")
    assert Recipe.load_text(recipe.dump()) == recipe


def test_the_library_example_learns_its_answer(tmp_path: Path) -> None:
    example = runpy.run_path(str(ROOT / "examples/fine_tune.py"))
    assert example["main"](tmp_path) == "We open at nine."
