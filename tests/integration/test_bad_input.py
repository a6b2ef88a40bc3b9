"""Each mistake: one clear sentence that names it, exit code 2, nothing half-written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import write_recipe
from safetensors.torch import load_file, save_file
from test_cli import llamaweft


def refused(tree: dict, tmp_path: Path, *words: str) -> None:
    """`train` on this recipe ends with 2, says these words and leaves no run folder."""
    recipe = write_recipe(tree, tmp_path / "recipe.yaml")
    done = llamaweft("train", recipe, cwd=tmp_path, code=2)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, done.stderr
    for word in words:
        assert word in lines[0]
    assert not Path(tree["output_dir"]).exists()


def with_rows(tree: dict, tmp_path: Path, content: str, name: str = "rows.jsonl") -> dict:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    return tree | {"data": tree["data"] | {"train": str(path)}}


GOOD = json.dumps({"prompt": "q", "completion": "a"}) + "\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (GOOD + "{oops\n", ["rows.jsonl line 2", "not valid JSON"]),
        (GOOD + '{"foo": 1}\n', ["rows.jsonl line 2", "no known shape", "foo"]),
        ("", ["rows.jsonl", "no rows"]),
        (GOOD, ["data.validation", "at least 2"]),
        (
            GOOD + '{"messages": [{"role": "user", "content": "q"}]}\n',
            ["line 2", "messages", "prompt_completion"],
        ),
        (
            '{"messages": [{"role": "user", "content": "q"}]}\n'
            '{"messages": [{"role": "user", "content": "r"}]}\n',
            ["no_trained_token", "rows.jsonl line"],
        ),
    ],
)
def test_rows(recipe_tree: dict, tmp_path: Path, content: str, words: list[str]) -> None:
    refused(with_rows(recipe_tree, tmp_path, content), tmp_path, *words)


def test_a_missing_data_file(recipe_tree: dict, tmp_path: Path) -> None:
    recipe_tree["data"]["train"] = str(tmp_path / "gone.jsonl")
    refused(recipe_tree, tmp_path, "gone.jsonl", "there is no file")


def test_an_unknown_key(recipe_tree: dict, tmp_path: Path) -> None:
    recipe_tree["training"]["lr"] = 1
    refused(recipe_tree, tmp_path, "training.lr", "line 1")


def test_a_missing_recipe(tmp_path: Path) -> None:
    assert "none.yaml" in llamaweft("train", tmp_path / "none.yaml", code=2).stderr


def test_a_budget_that_is_too_small(recipe_tree: dict, tmp_path: Path) -> None:
    recipe_tree["training"]["memory_budget"] = "100MiB"
    refused(recipe_tree, tmp_path, "training.memory_budget", "the smallest that works is")


def test_an_unknown_target_module(recipe_tree: dict, tmp_path: Path) -> None:
    recipe_tree["adapter"]["target_modules"] = ["q_prj"]
    refused(recipe_tree, tmp_path, "q_prj", "q_proj")


@pytest.fixture
def broken(recipe_tree: dict, tmp_path: Path) -> tuple[dict, Path]:
    """A recipe on a copy of the tiny model, for a test to break."""
    folder = tmp_path / "model"
    shutil.copytree(recipe_tree["model"], folder)
    return recipe_tree | {"model": str(folder)}, folder


def test_a_missing_shard(broken: tuple[dict, Path], tmp_path: Path) -> None:
    tree, folder = broken
    (folder / "model.safetensors").unlink()
    refused(tree, tmp_path, str(folder), "no model.safetensors")


def test_a_shard_that_the_index_names_and_is_not_there(
    broken: tuple[dict, Path], tmp_path: Path
) -> None:
    tree, folder = broken
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(tree, tmp_path, "model-00001-of-00002.safetensors", "missing")


def test_a_shard_cut_short(broken: tuple[dict, Path], tmp_path: Path) -> None:
    tree, folder = broken
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    refused(tree, tmp_path, "model.safetensors", "cut short")


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_a_tensor_that_lacks(broken: tuple[dict, Path], tmp_path: Path) -> None:
    tree, folder = broken
    rewrite(folder, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    refused(tree, tmp_path, "lacks the tensor model.layers.1.mlp.up_proj.weight")


def test_a_tensor_of_another_shape(broken: tuple[dict, Path], tmp_path: Path) -> None:
    tree, folder = broken
    rewrite(folder, lambda t: t.update({"model.norm.weight": torch.ones(8)}))
    refused(tree, tmp_path, "model.norm.weight", "(8,)", "(64,)")


def test_a_wrong_dtype(broken: tuple[dict, Path], tmp_path: Path) -> None:
    tree, folder = broken
    name = "model.layers.0.self_attn.q_proj.weight"
    rewrite(folder, lambda t: t.update({name: t[name].to(torch.int8)}))
    refused(tree, tmp_path, name, "I8", "unquantised")


def test_a_config_of_another_architecture(broken: tuple[dict, Path], tmp_path: Path) -> None:
    tree, folder = broken
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    refused(tree, tmp_path, "config.json", "gpt2")


def test_a_model_folder_that_is_not_there(recipe_tree: dict, tmp_path: Path) -> None:
    recipe_tree["model"] = str(tmp_path / "gone")
    refused(recipe_tree, tmp_path, "gone", "there is no model folder")


def test_a_disk_that_is_full_at_the_start(
    recipe_tree: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llamaweft.errors import UserError
    from llamaweft.pipeline import Pipeline
    from llamaweft.recipe import Recipe

    nearly_full = shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: nearly_full)
    with pytest.raises(UserError, match=r"the disk of .* MiB free, the run needs"):
        Pipeline(Recipe.validate_tree(recipe_tree)).train()
    assert not Path(recipe_tree["output_dir"]).exists()


def test_a_folder_with_other_files(recipe_tree: dict, tmp_path: Path) -> None:
    output = Path(recipe_tree["output_dir"])
    output.mkdir()
    (output / "thesis.txt").write_text("precious")
    recipe = write_recipe(recipe_tree, tmp_path / "recipe.yaml")
    done = llamaweft("train", recipe, cwd=tmp_path, code=2)
    assert "thesis.txt" in done.stderr
    assert [p.name for p in output.iterdir()] == ["thesis.txt"]


def test_an_unknown_verb_and_an_unknown_option() -> None:
    llamaweft("fine-tune", code=2)
    llamaweft("doctor", "--frobnicate", code=2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--device", "h1000"], ["--device h1000", "known are", "h100"]),
        (["--price-per-hour", "cheap"], ["price-per-hour", "valid number"]),
        (["--price-per-hour", "-1"], ["price-per-hour"]),
    ],
)
def test_options_of_plan(recipe_tree: dict, tmp_path: Path, options: list, words: list) -> None:
    recipe = write_recipe(recipe_tree, tmp_path / "recipe.yaml")
    done = llamaweft("plan", recipe, *options, cwd=tmp_path, code=2)
    for word in words:
        assert word in done.stderr


def test_a_prompt_longer_than_the_context(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "word " * 20_000}) + "\n")
    command = ("predict", tiny_folder, "prompts.jsonl", "--output", "answers.jsonl")
    done = llamaweft(*command, cwd=tmp_path, code=2)
    assert "prompts.jsonl line 1" in done.stderr
    assert "leaves no room for an answer" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["prompts.jsonl"]


def test_prompts_without_a_question(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"text": "once upon a time"}) + "\n")
    command = ("predict", tiny_folder, "prompts.jsonl", "--output", "answers.jsonl")
    assert "line 1 has only text" in llamaweft(*command, cwd=tmp_path, code=2).stderr
