"""Runs with DoRA and LoRA+, and runs that go on from an adapter, as a person starts them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llamaweft.errors import UserError
from llamaweft.pipeline import Pipeline, open_run
from llamaweft.recipe import Recipe
from llamaweft.subject import export_run


def trained(tree: dict, resume: bool = False, **adapter: object) -> dict:
    tree["adapter"] |= adapter
    return Pipeline(Recipe.validate_tree(tree)).train(resume=resume)


def losses(folder: Path) -> list[tuple]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines]


def loss_of(result: dict, side: str) -> float:
    return result["evaluation"][side]["metrics"]["loss"]["value"]


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_dora_with_loraplus_learns_resumes_bit_for_bit_and_is_exported(
    recipe_tree: dict, tmp_path: Path, optimizer: str
) -> None:
    if optimizer == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    recipe_tree["training"] |= {"optimizer": optimizer}
    result = trained(recipe_tree, method="dora", loraplus_lr_ratio=4)
    assert loss_of(result, "after") < loss_of(result, "before")
    whole, half = tmp_path / "run", tmp_path / "half"
    shutil.copytree(whole, half)
    shutil.rmtree(half / "checkpoints/step-000006")
    recipe_tree["output_dir"] = str(half)
    trained(recipe_tree, resume=True)
    assert losses(half) == losses(whole)
    for name in ("trained.safetensors", "optimizer.safetensors"):
        ours, theirs = (load_file(r / "checkpoints/step-000006" / name) for r in (half, whole))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert "DoRA r 4" in json.loads((whole / "plan.json").read_text())["decisions"]["trained"]
    for to in ("hf", "peft"):
        parity = export_run(whole, to, tmp_path / to)
        assert parity is not None
        assert parity.passed


def test_the_ratio_reaches_the_optimizer(recipe_tree: dict, tmp_path: Path) -> None:
    recipe_tree["training"] |= {"max_steps": 1, "warmup_ratio": 0, "weight_decay": 0}
    moved = {}
    for ratio in (1, 8):
        recipe_tree["output_dir"] = str(tmp_path / str(ratio))
        trained(recipe_tree, loraplus_lr_ratio=ratio)
        weights = load_file(tmp_path / str(ratio) / "checkpoints/step-000001/trained.safetensors")
        moved[ratio] = next(w for name, w in weights.items() if name.endswith("lora_B"))
    torch.testing.assert_close(moved[8], 8 * moved[1])


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_run_goes_on_from_an_adapter(recipe_tree: dict, tmp_path: Path, method: str) -> None:
    first = trained(recipe_tree, method=method)
    adapter = tmp_path / "moved"
    shutil.copytree(tmp_path / "run/adapter", adapter)
    recipe_tree["output_dir"] = str(tmp_path / "second")
    second = trained(recipe_tree, init_from=str(adapter))
    assert loss_of(second, "before") == loss_of(first, "after")
    assert loss_of(second, "after") < loss_of(second, "before")
    whole, half = tmp_path / "second", tmp_path / "half"
    shutil.copytree(whole, half)
    shutil.rmtree(half / "checkpoints/step-000006")
    shutil.rmtree(adapter)  # what became of it is in the checkpoint
    recipe_tree["output_dir"] = str(half)
    trained(recipe_tree, resume=True)
    assert losses(half) == losses(whole)
    run = open_run(half)
    assert run is not None
    run.trained_model()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"r": 2}, r"adapter\.r: 4"),
        ({"lora_alpha": 16}, r"adapter\.lora_alpha: 8"),
        ({"use_rslora": True}, r"adapter\.use_rslora: False"),
        ({"target_modules": ["q_proj"]}, r"adapter\.target_modules: \["),
        ({"method": "dora"}, r"adapter\.method: lora"),
    ],
)
def test_an_adapter_of_another_kind_is_refused(
    recipe_tree: dict, tmp_path: Path, changes: dict, said: str
) -> None:
    recipe_tree["training"] |= {"max_steps": 1}
    trained(recipe_tree)
    recipe_tree["output_dir"] = str(tmp_path / "second")
    with pytest.raises(UserError, match=said):
        trained(recipe_tree, init_from=str(tmp_path / "run/adapter"), **changes)
    assert not (tmp_path / "second").exists()


def test_an_adapter_of_another_base_or_none_is_refused(recipe_tree: dict, tmp_path: Path) -> None:
    recipe_tree["training"] |= {"max_steps": 1}
    trained(recipe_tree)
    recipe_tree["output_dir"] = str(tmp_path / "second")
    other = tmp_path / "other"
    shutil.copytree(recipe_tree["model"], other)
    with pytest.raises(UserError, match=r"cannot be read"):
        trained(recipe_tree, init_from=str(other))
    recipe_tree["model"] = str(other)
    with pytest.raises(UserError, match=r"was trained on .*set model: "):
        trained(recipe_tree, init_from=str(tmp_path / "run/adapter"))
    copy = shutil.copytree(tmp_path / "run/adapter", tmp_path / "copy")
    content = json.loads((copy / "adapter_config.json").read_text())
    content["target_modules"] = "all-linear"
    (copy / "adapter_config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"a pattern"):
        trained(recipe_tree, init_from=str(copy))
