"""Runs that train parts of a model whole, alone or beside an adapter, as a person starts them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_adapters import loss_of, losses
from test_tasks import write_task

from llamaweft.errors import UserError
from llamaweft.model.init import init_random
from llamaweft.model.load import load_causal_lm
from llamaweft.pipeline import Pipeline, open_run
from llamaweft.recipe import Recipe
from llamaweft.runtime import Runtime
from llamaweft.subject import export_run


def trained(tree: dict, resume: bool = False) -> dict:
    return Pipeline(Recipe.validate_tree(tree)).train(resume=resume)


def resumed_from_the_middle(tree: dict, whole: Path, half: Path) -> None:
    """Runs the second half of a run again, and holds it against the first time."""
    shutil.copytree(whole, half)
    shutil.rmtree(half / "checkpoints/step-000006")
    trained(tree | {"output_dir": str(half)}, resume=True)
    assert losses(half) == losses(whole)
    for name in ("trained.safetensors", "optimizer.safetensors"):
        ours, theirs = (load_file(r / "checkpoints/step-000006" / name) for r in (half, whole))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize(
    ("adapter", "codec", "is_trained"),
    [
        ({"top_layers": 1}, "nf4", lambda name: ".layers.1." in name),
        (
            {"top_layers": 1, "modules_to_save": ["embed_tokens", "norm"]},
            "int8",
            lambda name: (
                ".layers.1." in name or name in ("model.embed_tokens.weight", "model.norm.weight")
            ),
        ),
    ],
)
def test_a_part_is_trained_resumed_bit_for_bit_and_exported(
    recipe_tree: dict, tmp_path: Path, adapter: dict, codec: str, is_trained
) -> None:
    recipe_tree |= {"adapter": {"method": "none"} | adapter, "base_weights": codec}
    result = trained(recipe_tree)
    assert loss_of(result, "after") < loss_of(result, "before")
    run = tmp_path / "run"
    before = dict(load_causal_lm(Path(recipe_tree["model"]), base_weights=None).named_parameters())
    held = load_file(run / "checkpoints/step-000006/trained.safetensors")
    assert held.keys() == {name for name in before if is_trained(name)}
    plan = json.loads((run / "plan.json").read_text())
    assert plan["trained_parameters"] == sum(t.numel() for t in held.values())
    assert "layers 1 to 1" in plan["decisions"]["trained"]
    assert codec in plan["decisions"]["weights"]
    kept = load_file(run / "model/model.safetensors")
    assert kept.keys() == before.keys()
    assert all(torch.equal(kept[n], before[n]) for n in before if "norm" in n and n not in held)
    assert all(not torch.equal(kept[name], before[name]) for name in held)
    resumed_from_the_middle(recipe_tree, run, tmp_path / "half")
    parity = export_run(run, "hf", tmp_path / "hf")
    assert parity is not None
    assert parity.passed
    with pytest.raises(UserError, match="export --to hf"):
        export_run(run, "peft", tmp_path / "peft")


def test_the_run_is_opened_as_it_was_measured(recipe_tree: dict, tmp_path: Path) -> None:
    recipe_tree |= {"adapter": {"method": "none", "top_layers": 1}, "base_weights": "nf4"}
    result = trained(recipe_tree)
    run = open_run(tmp_path / "run")
    assert run is not None
    assert run.evaluator is not None
    measured = run.evaluator.measure(run.trained_model())
    assert measured["metrics"]["loss"]["value"] == loss_of(result, "after")


def test_a_folder_with_a_store_only_starts_from_what_that_holds(
    recipe_tree: dict, tmp_path: Path
) -> None:
    folder = tmp_path / "stored"
    init_random("tiny", folder, "builtin:smollm2-135m", "nf4", seed=1)
    frozen = load_causal_lm(folder, base_weights="nf4")
    names = ("model.layers.1.mlp.up_proj", "model.norm")
    part = load_causal_lm(folder, base_weights="nf4", trained=names)
    assert torch.equal(
        part.get_submodule(names[0]).weight, frozen.get_submodule(names[0]).dequantised()
    )
    assert part.get_submodule(names[1]).weight.requires_grad


@pytest.mark.parametrize(
    ("task", "adapter", "trains"),
    [
        ("sequence_classification", {"modules_to_save": ["score"]}, {"score.weight"}),
        (
            "question_answering",
            {"modules_to_save": ["norm"]},
            {"transformer.norm.weight", "qa_outputs.weight", "qa_outputs.bias"},
        ),
    ],
)
def test_a_head_of_its_own_is_always_trained(
    tiny_folder: Path, tmp_path: Path, monkeypatch, task: str, adapter: dict, trains: set
) -> None:
    monkeypatch.chdir(tmp_path)
    tree = json.loads(write_task(tmp_path, tiny_folder, task, max_steps=2).read_text())
    tree |= {"adapter": {"method": "none"} | adapter, "base_weights": "nf4"}
    trained(tree)
    held = load_file(tmp_path / "run/checkpoints/step-000002/trained.safetensors")
    assert held.keys() == trains
    parity = export_run(tmp_path / "run", "hf", tmp_path / "hf")
    assert parity is not None
    assert parity.passed


@pytest.mark.parametrize(
    ("method", "modules", "is_tied"),
    [("lora", ["embed_tokens", "norm"], False), ("dora", ["lm_head"], True)],
)
def test_modules_beside_an_adapter_are_resumed_exported_and_gone_on_from(
    recipe_tree: dict, tied_folder: Path, tmp_path: Path, method: str, modules: list, is_tied: bool
) -> None:
    if is_tied:
        recipe_tree["model"] = str(tied_folder)
    recipe_tree["adapter"] |= {"method": method, "modules_to_save": modules}
    recipe_tree["base_weights"] = "nf4"
    result = trained(recipe_tree)
    assert loss_of(result, "after") < loss_of(result, "before")
    run = tmp_path / "run"
    held = load_file(run / "checkpoints/step-000006/trained.safetensors")
    plan = json.loads((run / "plan.json").read_text())
    assert plan["trained_parameters"] == sum(t.numel() for t in held.values())
    assert f"with {', '.join(modules)} whole" in plan["decisions"]["trained"]
    resumed_from_the_middle(recipe_tree, run, tmp_path / "half")
    for to in ("hf", "peft"):
        parity = export_run(run, to, tmp_path / to)
        assert parity is not None
        assert parity.passed
    recipe_tree["adapter"]["init_from"] = str(run / "adapter")
    recipe_tree["training"] |= {"max_steps": 1}
    second = trained(recipe_tree | {"output_dir": str(tmp_path / "second")})
    assert loss_of(second, "before") == loss_of(result, "after")
    del recipe_tree["adapter"]["modules_to_save"]
    with pytest.raises(UserError, match=r"has modules_to_save: \["):
        trained(recipe_tree | {"output_dir": str(tmp_path / "third")})


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        ({"modules_to_save": ["lm_head"]}, r"cannot hold both them and all of lm_head"),
        ({"method": "none", "top_layers": 1}, r"add lm_head and embed_tokens to"),
    ],
)
def test_new_tokens_and_what_is_trained_whole_do_not_meet(
    recipe_tree: dict, adapter: dict, said: str
) -> None:
    recipe_tree["data"]["new_tokens"] = ["<tool>"]
    with pytest.raises(UserError, match=said):
        trained(recipe_tree | {"adapter": adapter})


def test_new_tokens_are_trained_with_a_vocabulary_that_is_trained_whole(
    recipe_tree: dict, tmp_path: Path
) -> None:
    recipe_tree["data"]["new_tokens"] = ["<tool>"]
    recipe_tree["adapter"] = {"method": "none", "modules_to_save": ["embed_tokens", "lm_head"]}
    recipe_tree["base_weights"] = "nf4"
    recipe_tree["training"] |= {"max_steps": 2}
    result = trained(recipe_tree)
    run = open_run(tmp_path / "run")
    assert run is not None
    assert run.evaluator is not None
    measured = run.evaluator.measure(run.trained_model())
    assert measured["metrics"]["loss"]["value"] == loss_of(result, "after")
    plan = json.loads((tmp_path / "run/plan.json").read_text())
    held = load_file(tmp_path / "run/checkpoints/step-000002/trained.safetensors")
    assert plan["trained_parameters"] == sum(t.numel() for t in held.values())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"adapter": {"method": "none", "top_layers": 3}}, r"top_layers: 3 .*2 layers"),
        (
            {"adapter": {"method": "none", "modules_to_save": ["embed"]}},
            r"'embed' \(did you mean embed_tokens\?\); there are embed_tokens, q_proj,.* lm_head",
        ),
        ({"adapter": {"method": "lora", "top_layers": 1}}, r"top_layers: .*method: none"),
        ({"adapter": {"method": "none", "top_layers": 1, "r": 4}}, r"adapter\.r would be ignored"),
        ({"adapter": {"method": "none"}, "base_weights": "nf4"}, r"set adapter\.top_layers"),
        (
            {"adapter": {"modules_to_save": ["q_proj"]}},
            r"q_proj is adapted too \(adapter\.target_modules: q_proj\)",
        ),
        (
            {"adapter": {"method": "none", "modules_to_save": ["score"]}},
            r"no module 'score'",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_before_the_start(
    recipe_tree: dict, tmp_path: Path, changes: dict, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        trained(recipe_tree | changes)
    assert not (tmp_path / "run").exists()


IN_BACKWARD = {
    "optimizer_in_backward": True,
    "gradient_accumulation_steps": 1,
    "max_grad_norm": None,
}


@pytest.mark.parametrize("adapter", [{"method": "none"}, {"method": "lora", "r": 4}])
def test_a_step_in_the_backward_pass_is_the_usual_one_and_resumes_bit_for_bit(
    recipe_tree: dict, tmp_path: Path, adapter: dict
) -> None:
    recipe_tree["adapter"] = adapter
    runs = {}
    for fused in (False, True):
        recipe_tree["output_dir"] = str(tmp_path / f"{fused}")
        recipe_tree["training"] |= IN_BACKWARD | {"optimizer_in_backward": fused}
        trained(recipe_tree)
        lines = (tmp_path / f"{fused}/metrics.jsonl").read_text().splitlines()
        runs[fused] = [
            tuple(json.loads(line).get(key) for key in ("step", "loss", "grad_norm", "lr"))
            for line in lines
        ]
    assert runs[True] == runs[False]
    for name in ("trained.safetensors", "optimizer.safetensors"):
        ours, theirs = (
            load_file(tmp_path / f"{fused}/checkpoints/step-000006" / name)
            for fused in (True, False)
        )
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    resumed_from_the_middle(recipe_tree, tmp_path / "True", tmp_path / "half")
    plan = json.loads((tmp_path / "True/plan.json").read_text())
    config = json.loads((Path(recipe_tree["model"]) / "config.json").read_text())
    largest = 4 * (config["hidden_size"] + config["intermediate_size"])
    if adapter["method"] == "none":
        largest = config["vocab_size"] * config["hidden_size"]
    assert plan["parts"]["gradients"] == 4 * largest
    assert "in the backward pass" in plan["decisions"]["trained"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"gradient_accumulation_steps": 2}, r"set gradient_accumulation_steps: 1"),
        ({"max_grad_norm": 1.0}, r"set max_grad_norm: null"),
        ({"compute_dtype": "fp16"}, r"set compute_dtype: fp32"),
    ],
)
def test_a_step_in_the_backward_pass_says_what_it_cannot_be_with(
    recipe_tree: dict, tmp_path: Path, changes: dict, said: str
) -> None:
    recipe_tree["training"] |= IN_BACKWARD | changes
    with pytest.raises(UserError, match=rf"optimizer_in_backward: .*{said}"):
        trained(recipe_tree)


def test_fp16_of_a_device_is_refused_with_a_step_in_the_backward_pass(recipe_tree: dict) -> None:
    recipe_tree["training"] |= IN_BACKWARD
    pipeline = Pipeline(Recipe.validate_tree(recipe_tree))
    pipeline.runtime = Runtime(torch.device("cpu"), torch.float16, "an old device", 1)
    with pytest.raises(UserError, match=r"an old device.*compute_dtype: fp32"):
        pipeline.plan()


def test_what_is_trained_whole_does_not_start_as_the_base_in_a_codec(recipe_tree: dict) -> None:
    assert Pipeline(Recipe.validate_tree(recipe_tree)).starts_as_base
    recipe_tree["adapter"]["modules_to_save"] = ["norm"]
    assert not Pipeline(Recipe.validate_tree(recipe_tree)).starts_as_base
