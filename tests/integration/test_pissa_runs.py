"""Runs that start from the principal part of the weights, as a person starts them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_adapters import loss_of, losses, trained

from llamaweft.adapters.lora import constants
from llamaweft.errors import UserError
from llamaweft.model.init import init_random
from llamaweft.pipeline import Pipeline, open_run
from llamaweft.recipe import Recipe
from llamaweft.subject import compare_subjects, export_run, open_subject
from llamaweft.train.optim import trained_parameters


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4"])
def test_pissa_learns_resumes_without_another_start_and_is_exported(
    recipe_tree: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, init: str
) -> None:
    recipe_tree["training"] |= {"learning_rate": 3e-3}
    recipe_tree["base_weights"] = "fp32" if init == "pissa" else "bf16"
    result = trained(
        recipe_tree, init_lora_weights=init, use_rslora=init != "pissa", loraplus_lr_ratio=2
    )
    assert loss_of(result, "after") < loss_of(result, "before")
    whole, half = tmp_path / "run", tmp_path / "half"
    decisions = json.loads((whole / "plan.json").read_text())["decisions"]
    assert f"LoRA r 4 from the principal part of the weights ({init})" in decisions["trained"]
    for to in ("hf", "peft"):
        parity = export_run(whole, to, tmp_path / to)
        assert parity is not None
        assert parity.passed

    def refused(*arguments: object) -> None:
        raise AssertionError("the singular values were taken again")

    monkeypatch.setattr("llamaweft.adapters.lora.principal", refused)
    shutil.copytree(whole, half)
    shutil.rmtree(half / "checkpoints/step-000006")
    recipe_tree["output_dir"] = str(half)
    trained(recipe_tree, resume=True)
    assert losses(half) == losses(whole)
    for name in ("trained.safetensors", "optimizer.safetensors"):
        ours, theirs = (load_file(r / "checkpoints/step-000006" / name) for r in (half, whole))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    state = json.loads((whole / "checkpoints/step-000006/state.json").read_text())
    assert state["best_step"] == 6
    for folder in (half, whole):
        run = open_run(folder)
        assert run is not None
        model = run.trained_model()
        held = trained_parameters(model) | constants(model)
        saved = load_file(whole / "checkpoints/step-000006/trained.safetensors")
        assert held.keys() == saved.keys()
        assert all(torch.equal(held[key], saved[key]) for key in saved)


def test_the_start_is_the_untouched_model(recipe_tree: dict, tmp_path: Path) -> None:
    recipe_tree["training"] |= {"max_steps": 1}
    plain = trained(recipe_tree)
    recipe_tree["output_dir"] = str(tmp_path / "pissa")
    pissa = trained(recipe_tree, init_lora_weights="pissa")
    assert loss_of(pissa, "before") == loss_of(plain, "before")
    assert loss_of(pissa, "after") != loss_of(plain, "after")


def test_the_folder_is_a_plain_adapter_to_measure_and_to_go_on_from(
    recipe_tree: dict, tmp_path: Path
) -> None:
    recipe_tree["training"] |= {"learning_rate": 3e-3}
    first = trained(recipe_tree, init_lora_weights="pissa")
    adapter = tmp_path / "run/adapter"
    content = json.loads((adapter / "adapter_config.json").read_text())
    assert (content["r"], content["lora_alpha"], content["init_lora_weights"]) == (8, 16, True)
    assert type(open_subject(str(adapter)).model.model.layers[0].mlp.up_proj).__name__ == (
        "LoraLinear"
    )
    measured = compare_subjects(str(adapter), None, recipe=tmp_path / "run/recipe.yaml")
    recipe_tree["output_dir"] = str(tmp_path / "second")
    with pytest.raises(UserError, match=r"set adapter\.r: 8"):
        trained(recipe_tree, init_lora_weights="default", init_from=str(adapter))
    second = trained(recipe_tree, r=8, lora_alpha=16)
    for loss in (loss_of({"evaluation": measured}, "before"), loss_of(second, "before")):
        assert loss == pytest.approx(loss_of(first, "after"), rel=1e-5)
    assert loss_of(second, "after") < loss_of(second, "before")


def test_weights_that_turn_out_to_be_quantised_are_refused(
    recipe_tree: dict, tmp_path: Path
) -> None:
    own = tmp_path / "own"
    init_random("tiny", own, "builtin:smollm2-135m", "nf4", seed=1)
    recipe_tree |= {"base_weights": "auto", "model": str(own)}
    with pytest.raises(UserError, match=r"held in nf4 \(what the model folder holds\)"):
        trained(recipe_tree, init_lora_weights="pissa")
    assert not (tmp_path / "run").exists()
    open_subject(str(own), Recipe.validate_tree(recipe_tree))  # measured beside a run it may be


def test_large_weights_are_not_quantised_behind_its_back(recipe_tree: dict, tmp_path: Path) -> None:
    recipe_tree["base_weights"] = "auto"
    recipe_tree["training"] |= {"memory_budget": "4GiB"}
    recipe_tree["adapter"] |= {"init_lora_weights": "pissa"}
    pipeline = Pipeline(Recipe.validate_tree(recipe_tree))
    pipeline.free_bytes = 1000
    with pytest.raises(UserError, match=r"held in nf4 \(in fp32 they would take more"):
        pipeline.plan()


def test_a_rank_without_as_many_singular_values_is_refused(
    recipe_tree: dict, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"set adapter\.r: 32 or less"):
        trained(recipe_tree, init_lora_weights="pissa", r=40)
    assert not (tmp_path / "run").exists()
