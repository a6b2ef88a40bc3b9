"""`plan --devices`: many devices that are not here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import write_recipe


@pytest.fixture
def planned(command, recipe_tree: dict, tmp_path: Path):
    """Plans the recipe for some devices: the plan, or the one error."""

    def call(*options: str, code: int = 0, **keys: object):
        recipe_tree["training"]["gradient_accumulation_steps"] = 4
        path = write_recipe(recipe_tree | keys, tmp_path / "recipe.yaml")
        said = command("plan", path, *options, "--json", code=code)
        return said if code else json.loads(said)

    return call


def test_a_plan_for_many_chooses_and_says_why_and_costs_each_device(planned) -> None:
    found = planned("--devices", "4xt4", "--price-per-hour", "0.5")
    assert (found["layout"], found["devices"], found["nodes"]) == ("data 4", 4, 1)
    assert "the least of 5 layouts that fit" in found["decisions"]["parallel"]
    assert "4 x NVIDIA T4 (not measured)" in found["decisions"]["device"]
    assert found["cost"] == pytest.approx(found["total_seconds"] / 3600 * 4 * 0.5)
    by_layout = {of["layout"]: of for of in found["layouts"]}
    chosen = by_layout["data 4"]
    assert chosen["seconds_per_step"] == found["seconds_per_step"]
    assert chosen["peak_bytes"] == found["peak_bytes"]
    (transfer,) = chosen["transfers"]
    assert transfer["payload_bytes"] == 4 * found["trained_parameters"]
    assert transfer["wire_bytes"] == 2 * 3 / 4 * transfer["payload_bytes"]
    assert by_layout["shard 4"]["peak_bytes"] != chosen["peak_bytes"]
    assert "num_key_value_heads" in by_layout["tensor 4"]["why_not"]


def test_one_of_many_is_that_device(planned) -> None:
    one, many = planned("--device", "t4"), planned("--devices", "1xt4")
    assert many["layout"] == "one process"
    assert many["layouts"][0]["transfers"] == []
    assert (one["parts"], one["keep"]) == (many["parts"], many["keep"])


def test_a_layout_that_the_recipe_names_is_planned(planned) -> None:
    found = planned("--devices", "4xh100", "--nodes", "2", parallel={"shard": 2, "tensor": 2})
    assert found["parallel"] == {"data": 1, "shard": 2, "tensor": 2, "offload": False}
    assert found["decisions"]["parallel"] == "shard 2 x tensor 2: as the recipe says"
    assert found["parts"]["gathered"] > 0
    assert found["seconds"]["communication"] > 0


def test_what_does_not_go_together_is_refused(planned) -> None:
    named = planned("--devices", "8xt4", code=2, parallel={"data": 2})
    assert "is 2 ranks, and --devices has 8" in named
    assert "remove one" in planned("--devices", "2xt4", "--device", "t4", code=2)
    assert "give --devices" in planned("--nodes", "2", code=2)
    assert "give --nodes" in planned("--devices", "2xt4", "--network-gbit", "10", code=2)
    assert "no data sheet" in planned("--devices", "2xcpu", code=2)
    assert "16 ranks have packs of their own" in planned("--devices", "16xt4", code=2)


def test_layouts_that_the_method_does_not_go_with_are_not_offered(planned, recipe_tree) -> None:
    recipe_tree["adapter"]["method"] = "dora"
    found = planned("--devices", "2xt4")
    refused = {of["layout"]: of["why_not"] for of in found["layouts"] if "why_not" in of}
    assert "norms of whole rows" in refused["tensor 2"]
    assert "norms of whole rows" in planned("--devices", "2xt4", code=2, parallel={"tensor": 2})


def test_where_no_layout_fits_the_least_is_named(planned, recipe_tree: dict) -> None:
    recipe_tree["training"]["memory_budget"] = "65MiB"
    said = planned("--devices", "2xt4", code=2)
    assert "no layout of 2 ranks fits: a rank may take 0.06 GiB" in said


def test_a_table_shows_the_layouts_and_what_was_assumed(command, recipe_tree, tmp_path) -> None:
    recipe_tree["training"]["gradient_accumulation_steps"] = 4
    path = write_recipe(recipe_tree, tmp_path / "recipe.yaml")
    said = " ".join(command("plan", path, "--devices", "4xh100", "--nodes", "2").split())
    assert "* data 4" in said
    assert "NVLink 4 within a machine" in said
    assert "800 Gbit/s of network" in said
    assert "reckoned, not measured" in said


def test_a_folder_without_weights_can_be_planned_for_a_device(
    command, planned, recipe_tree: dict, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    command(
        "model", "init", "tiny", bare, "--base-weights", "none",
        "--tokenizer", "builtin:smollm2-135m",
    )  # fmt: skip
    assert not list(bare.glob("*.safetensors"))
    found = planned("--devices", "2xh100", model=str(bare))
    assert "holds no weights" in found["decisions"]["model"]
    same = planned("--devices", "2xh100")
    assert found["parts"] == same["parts"]
    assert "holds no weights" not in same["decisions"]["model"]
    assert "--random and --base-weights none" in command(
        "model", "init", "tiny", tmp_path / "b", "--random", "--base-weights", "none",
        "--tokenizer", "builtin:smollm2-135m", code=2,
    )  # fmt: skip
