"""Models of other forms and of the hub through the command line: converted, trained, pinned."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import write_recipe
from hub_server import MAIN, OTHER, files_of, hub_here
from meta_folder import TINY, write_meta, write_tokenizer

from llamaweft.pipeline import Pipeline, open_run
from llamaweft.recipe import Recipe
from llamaweft.subject import open_subject

NAME = "acme/tiny-llama"


class Calls:
    def __init__(self, *call) -> None:
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


def test_metas_folder_is_converted_and_looked_into(command, tmp_path):
    params = TINY | {"n_kv_heads": 2, "rope_theta": 5e5, "use_scaled_rope": True}
    write_meta(tmp_path / "meta", params, 96, shards=2)
    write_tokenizer(tmp_path / "words")
    said = command("model", "convert", "meta", "new", code=2)
    assert "holds no tokenizer.model" in said
    assert "--tokenizer" in said
    assert not (tmp_path / "new").exists()
    out = command("model", "convert", "meta", "new", "--tokenizer", "words", "--json")
    assert json.loads(out) == {"folder": "new"}
    found = json.loads(command("model", "inspect", "new", "--json"))
    assert (found["dtypes"], found["tokens"], found["num_key_value_heads"]) == (["bfloat16"], 90, 2)
    assert "is not empty" in command(
        "model", "convert", "meta", "new", "--tokenizer", "words", code=2
    )
    assert "nothing to convert" in command("model", "convert", "new", "newer", code=2)


def test_code_in_metas_weights_does_not_run(command, tmp_path):
    write_meta(tmp_path / "meta", TINY, 96)
    marker = tmp_path / "ran"
    evil = {"tok_embeddings.weight": Calls(os.system, f"touch {marker}")}
    torch.save(evil, tmp_path / "meta/consolidated.00.pth")
    said = command("model", "convert", "meta", "new", "--tokenizer", "x/y", code=2)
    assert "code inside a file is never run" in said
    assert not marker.exists()
    assert not (tmp_path / "new").exists()


@pytest.fixture
def hub(monkeypatch, tmp_path, tiny_folder):
    with hub_here(monkeypatch, tmp_path / "hub") as hub:
        hub.add(NAME, files_of(tiny_folder))
        yield hub


def test_a_run_stays_with_the_commit_that_it_began_with(
    hub, command, recipe_tree, tmp_path, tiny_folder
):
    data = {"train": recipe_tree["data"]["train"], "validation": None}
    short = recipe_tree["training"] | {"max_steps": 1}
    tree = recipe_tree | {"model": NAME, "training": short, "data": data}
    del tree["evaluation"]
    recipe = write_recipe(tree, tmp_path / "recipe.yaml")
    command("train", recipe)
    run = tmp_path / "run"
    built = json.loads((run / "environment.json").read_text())["rebuild"]
    assert (built["model"], built["model_commit"]) == (NAME, MAIN)
    adapter = json.loads((run / "adapter/adapter_config.json").read_text())
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == (NAME, MAIN)

    hub.add(NAME, files_of(tiny_folder) | {"generation_config.json": b"{}"}, OTHER)  # main moves
    assert Pipeline(Recipe.load(recipe)).model_folder.name == MAIN  # as --resume opens it
    assert open_run(run).model_folder.name == MAIN
    assert open_subject(str(run / "adapter")).pipeline.model_folder.name == MAIN
    fresh = Recipe.load(recipe, [f"output_dir={tmp_path / 'other'}"])
    assert Pipeline(fresh).model_folder.name == OTHER
    pinned = Recipe.load(recipe, [f"output_dir={tmp_path / 'other'}", f"model_revision={MAIN}"])
    assert Pipeline(pinned).model_folder.name == MAIN
    command("export", run, "--to", "peft", "--output", "exported")
    exported = json.loads((tmp_path / "exported/adapter_config.json").read_text())
    assert (exported["base_model_name_or_path"], exported["revision"]) == (NAME, MAIN)
    said = command("train", recipe, "--resume", "model_revision=v2", code=2)
    assert "model_revision" in said


def test_a_revision_of_what_is_no_hub_model_is_refused(command, recipe_tree, tmp_path):
    recipe = write_recipe(recipe_tree | {"model_revision": "main"}, tmp_path / "recipe.yaml")
    said = command("train", recipe, code=2)
    assert "model_revision: main is for models of the hub" in said
    assert not (tmp_path / "run").exists()


def test_a_gated_model_ends_with_one_sentence(hub, command, recipe_tree, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "Secret" * 6)
    hub.gated = True
    recipe = write_recipe(recipe_tree | {"model": NAME}, tmp_path / "recipe.yaml")
    said = command("train", recipe, code=2)
    assert f"https://huggingface.co/{NAME}" in said
    assert "hf auth login" in said
    assert "Secret" not in said


def test_a_cut_download_ends_with_1_and_goes_on(hub, command, tmp_path: Path):
    hub.cut_after = 1_000_000
    assert "the same command goes on" in command("model", "inspect", NAME, code=1)
    hub.cut_after, hub.broken = None, False
    assert json.loads(command("model", "inspect", NAME, "--json"))["num_hidden_layers"] == 2
    assert any(r for _, path, r in hub.asked if path.endswith("model.safetensors"))
    assert "v9 is no commit" in command("model", "inspect", NAME, "--revision", "v9", code=2)
