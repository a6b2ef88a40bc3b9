"""Runs in fp16 and with 8-bit moments, as a person starts them and goes on with them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import write_recipe
from safetensors.torch import load_file
from test_cli import as_json, losses

from llamaweft.errors import UserError
from llamaweft.pipeline import Pipeline
from llamaweft.recipe import Recipe
from llamaweft.train.checkpoint import LoopState


def test_full_fine_tuning_in_fp16_with_8_bit_moments_resumes_bit_for_bit(
    recipe_tree: dict, tmp_path: Path
) -> None:
    recipe_tree["adapter"] = {"method": "none"}
    recipe_tree["training"] |= {"compute_dtype": "fp16", "optimizer": "adamw_8bit"}
    recipe_tree["training"] |= {"learning_rate": 1e-3}
    recipe = write_recipe(recipe_tree, tmp_path / "recipe.yaml")
    result = as_json("train", recipe)
    before, after = (
        result["evaluation"][s]["metrics"]["loss"]["value"] for s in ("before", "after")
    )
    assert after < before
    whole, half = tmp_path / "run", tmp_path / "half"
    assert json.loads((whole / "plan.json").read_text())["decisions"]["compute"].startswith("fp16")
    shutil.copytree(whole, half)
    shutil.rmtree(half / "checkpoints/step-000006")
    as_json("train", recipe, f"output_dir={half}", "--resume")
    assert losses(half) == losses(whole)
    end = "checkpoints/step-000006"
    states = [LoopState(**json.loads((r / end / "state.json").read_text())) for r in (whole, half)]
    assert states[0] == states[1]
    assert states[0].loss_scale == 2.0**16
    for name in ("trained.safetensors", "optimizer.safetensors"):
        ours, theirs = (load_file(folder / end / name) for folder in (half, whole))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert theirs["model.embed_tokens.weight:state1"].dtype == torch.uint8


def test_an_adapter_in_fp16_keeps_its_base_in_bf16(recipe_tree: dict, tmp_path: Path) -> None:
    recipe_tree["base_weights"] = "auto"
    recipe_tree["training"] |= {"compute_dtype": "fp16"}
    result = as_json("train", write_recipe(recipe_tree, tmp_path / "recipe.yaml"))
    sides = result["evaluation"]["before"], result["evaluation"]["after"]
    assert sides[1]["metrics"]["loss"]["value"] < sides[0]["metrics"]["loss"]["value"]
    plan = json.loads((tmp_path / "run/plan.json").read_text())
    assert "bf16" in plan["decisions"]["weights"]


def test_a_missing_optimizer_ends_it_before_it_starts(
    recipe_tree: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe_tree["training"] |= {"optimizer": "adamw_8bit"}
    monkeypatch.setattr("llamaweft.train.optim.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        Pipeline(Recipe.validate_tree(recipe_tree)).train()
    assert not (tmp_path / "run").exists()
