"""Frozen weights in a codec, from the command line: trained, exported, resumed, refused."""

from __future__ import annotations

import json
from pathlib import Path

from conftest import write_recipe
from test_cli import as_json, llamaweft

from llamaweft.model.stores import cached_store


def test_an_adapter_on_nf4_trains_and_its_exports_are_proven(
    recipe_tree: dict, tmp_path: Path
) -> None:
    recipe_tree["base_weights"] = "nf4"
    result = as_json("train", write_recipe(recipe_tree, tmp_path / "recipe.yaml"))
    sides = result["evaluation"]["before"], result["evaluation"]["after"]
    assert sides[1]["metrics"]["loss"]["value"] < sides[0]["metrics"]["loss"]["value"]
    assert cached_store(Path(recipe_tree["model"]), "nf4").is_dir()
    run = tmp_path / "run"
    state = json.loads((run / "checkpoints/step-000006/state.json").read_text())
    plan = json.loads((run / "plan.json").read_text())
    assert state["schedule"]["keep"] == plan["keep"]
    assert "nf4" in plan["decisions"]["weights"]
    for target, tolerance in (("peft", 1e-4), ("hf", 5e-2)):
        content = as_json("export", run, "--to", target, "--output", tmp_path / target)
        parity = content["parity"]
        assert parity["relative_difference"] < tolerance
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert config["dtype"] == "bfloat16"


def test_a_folder_that_is_a_store_alone(recipe_tree: dict, tmp_path: Path) -> None:
    folder = tmp_path / "random"
    options = ("--random", "--base-weights", "int8", "--tokenizer", "builtin:smollm2-135m")
    as_json("model", "init", "tiny", folder, *options)
    assert as_json("model", "inspect", folder)["dtypes"] == ["int8"]
    recipe_tree |= {"model": str(folder), "base_weights": "auto"}
    recipe = write_recipe(recipe_tree, tmp_path / "recipe.yaml")
    as_json("train", recipe, "training.max_steps=1")
    plan = json.loads((tmp_path / "run/plan.json").read_text())
    assert "int8: what the model folder holds" in plan["decisions"]["weights"]
    done = llamaweft("export", tmp_path / "run", "--to", "peft", "--output", tmp_path / "x", code=2)
    assert "--no-verify" in done.stderr
    done = llamaweft("train", recipe, "base_weights=nf4", "output_dir=other", code=2, cwd=tmp_path)
    assert "set base_weights: int8" in done.stderr


def test_a_damaged_store_is_never_trained_on(recipe_tree: dict, tmp_path: Path) -> None:
    folder = tmp_path / "random"
    options = ("--random", "--base-weights", "nf4", "--tokenizer", "builtin:smollm2-135m")
    as_json("model", "init", "tiny", folder, *options)
    data = folder / "store/weights.safetensors"
    content = bytearray(data.read_bytes())
    content[-3] ^= 4  # inside the last matrix
    data.write_bytes(content)
    recipe_tree |= {"model": str(folder), "base_weights": "nf4"}
    done = llamaweft("train", write_recipe(recipe_tree, tmp_path / "recipe.yaml"), code=2)
    assert "is damaged" in done.stderr
    data.write_bytes(content[:-10])
    done = llamaweft("train", write_recipe(recipe_tree, tmp_path / "r.yaml"), "--resume", code=2)
    assert "cut short" in done.stderr
