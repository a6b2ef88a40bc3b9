"""Several adapters on one base, from the command line: each as if alone, and ranked."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import write_recipe
from safetensors.torch import load_file
from test_cli import wait_for

SETTINGS = {
    "learning_rate": 1e-2,
    "max_steps": 4,
    "micro_batch_tokens": 128,
    "gradient_accumulation_steps": 2,
    "checkpoint_every_steps": 2,
    "compute_dtype": "fp32",
    "device": "cpu",
}
TIMES = ("seconds", "tokens_per_second", "useful_flops_per_second", "anon_bytes", "rss_bytes")


def write(folder: Path, tiny_folder: Path, chats: Path, **keys) -> Path:
    tree = {
        "model": str(tiny_folder),
        "data": {"train": str(chats), "validation": {"fraction": 0.3}},
        "adapter": {"r": 4, "lora_dropout": 0.1},
        "base_weights": "nf4",
        "training": dict(SETTINGS),
        "evaluation": {"every_steps": 2, "metrics": ["loss"]},
        "output_dir": "sweep",
    }
    return write_recipe(tree | keys, folder / "recipe.yaml")


def records(folder: Path) -> list[dict]:
    """What a run wrote of each step, without what a clock or the system says."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if k not in TIMES} for x in lines]


def same_run(ours: Path, theirs: Path) -> None:
    assert records(ours) == records(theirs)
    for name in ("adapter/adapter_model", "checkpoints/step-000004/optimizer"):
        left, right = (load_file(run / f"{name}.safetensors") for run in (ours, theirs))
        assert left.keys() == right.keys()
        assert all(torch.equal(left[key], right[key]) for key in right)
    assert json.loads((ours / "evaluation.json").read_text()) == json.loads(
        (theirs / "evaluation.json").read_text()
    )


def test_every_run_of_a_sweep_equals_the_recipe_alone(
    tiny_folder: Path, tmp_path: Path, chats: Path, command
) -> None:
    """Dropout draws random numbers, a run of another rank has other shapes, and another seed holds
    out other rows."""
    recipe = write(tmp_path, tiny_folder, chats)
    said = command(
        *("train", recipe.name, "--sweep", "adapter.r=2,4", "training.seed=0,1", "--json")
    )
    content = json.loads(said)
    assert content["axes"] == {"adapter.r": ["2", "4"], "training.seed": ["0", "1"]}
    assert len(content["runs"]) == 4
    assert content == json.loads((tmp_path / "sweep/sweep.json").read_text())
    values = [run["metrics"]["loss"]["value"] for run in content["runs"]]
    assert values == sorted(values)
    assert len({*values}) == 4
    for number in (2, 3):
        (run,) = (r for r in content["runs"] if f"/0{number}-" in r["folder"])
        changes = [f"{key}={value}" for key, value in run["changes"].items()]
        command("train", recipe.name, *changes, f"output_dir=alone-{number}")
        same_run(tmp_path / run["folder"], tmp_path / f"alone-{number}")


def test_methods_are_swept_too(tiny_folder: Path, tmp_path: Path, chats: Path, command) -> None:
    recipe = write(tmp_path, tiny_folder, chats, adapter={"r": 4})
    content = json.loads(
        command(
            *("train", recipe.name, "--sweep", "adapter.method=lora,dora"),
            *("adapter.target_modules=all-linear,[q_proj, v_proj]", "--json"),
        )
    )
    (run,) = (r for r in content["runs"] if "/04-" in r["folder"])
    assert run["changes"]["adapter.target_modules"] == "[q_proj, v_proj]"
    command(
        *("train", recipe.name, "adapter.method=dora", "output_dir=alone"),
        "adapter.target_modules=[q_proj, v_proj]",
    )
    same_run(tmp_path / run["folder"], tmp_path / "alone")


def test_heads_are_swept_too(tiny_folder: Path, tmp_path: Path, command) -> None:
    rows = [{"text": f"day {i}", "label": "ab"[i % 2]} for i in range(30)]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    recipe = write(tmp_path, tiny_folder, data, task="sequence_classification")
    content = json.loads(
        command("train", recipe.name, "--sweep", "head.class_weights=null,{a: 2.0}", "--json")
    )
    (run,) = (r for r in content["runs"] if "/02-" in r["folder"])
    command("train", recipe.name, "head.class_weights={a: 2.0}", "output_dir=alone")
    same_run(tmp_path / run["folder"], tmp_path / "alone")


def test_the_table_ranks_the_runs(tiny_folder: Path, tmp_path: Path, chats: Path, command) -> None:
    recipe = write(tmp_path, tiny_folder, chats)
    said = command("train", recipe.name, "--sweep", "training.learning_rate=1e-2,1e-5")
    lines = said.splitlines()
    first, second = (next(line for line in lines if f"{n}-learning" in line) for n in ("01", "02"))
    assert lines.index(first) < lines.index(second)
    assert "worse" in second
    assert max(map(len, lines)) <= 80


def test_a_killed_sweep_goes_on_bit_for_bit(
    tiny_folder: Path, tmp_path: Path, chats: Path, command
) -> None:
    recipe = write(tmp_path, tiny_folder, chats)
    axes = ("training.learning_rate=1e-2,1e-3", "training.max_steps=40")
    process = subprocess.Popen(
        [sys.executable, "-m", "llamaweft", "train", recipe.name, "--sweep", *axes],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"COLUMNS": "80"},
    )
    name = "02-learning_rate=1e-3"
    wait_for(tmp_path / f"sweep/{name}/checkpoints/step-000004", process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    command("train", recipe.name, "--sweep", *axes, code=2)
    other = ("training.learning_rate=1e-2,1e-4", axes[1])
    assert "others" in command("train", recipe.name, "--sweep", *other, "--resume", code=2)
    command("train", recipe.name, "--sweep", *axes, "--resume")
    command("train", recipe.name, axes[1], "training.learning_rate=1e-3", "output_dir=alone")
    left, right = (
        load_file(run / "adapter/adapter_model.safetensors")
        for run in (tmp_path / "sweep" / name, tmp_path / "alone")
    )
    assert all(torch.equal(left[key], right[key]) for key in right)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["training.learning_rate=1e-4"], ["several values"]),
        (["data.max_length_tokens=64,128"], ["data.max_length_tokens", "in common"]),
        (["training.compute_dtype=fp32,bf16"], ["training.compute_dtype", "in common"]),
        (["adapter.r=8,"], ["empty value"]),
        (["adapter.r=8,8"], ["twice"]),
        (["adapter.r=8,eight"], ["adapter.r", "eight"]),
        (["adapter.r=8,4", "data.validation=null"], ["ranks"]),
        (["adapter.method=lora,none"], ["adapter.method"]),
        (["adapter.r=8,4", "training.report_to=[wandb]"], ["wandb"]),
    ],
)
def test_a_sweep_that_cannot_be_is_refused(
    tiny_folder: Path, tmp_path: Path, chats: Path, command, arguments: list[str], words: list[str]
) -> None:
    recipe = write(tmp_path, tiny_folder, chats, adapter={"r": 4}, evaluation={})
    said = command("train", recipe.name, "--sweep", *arguments, code=2)
    assert all(word in said for word in words), said
    assert not (tmp_path / "sweep").exists()


def test_the_plan_of_a_run_counts_the_others(
    tiny_folder: Path, tmp_path: Path, chats: Path, command, monkeypatch
) -> None:
    monkeypatch.setattr("llamaweft.pieces.fitted.anon_bytes", lambda: 10**8)
    recipe = write(tmp_path, tiny_folder, chats)
    command("train", recipe.name, "--sweep", "adapter.r=2,64")
    parts = {}
    for folder in sorted((tmp_path / "sweep").glob("0*")):
        parts[folder.name[-2:]] = json.loads((folder / "plan.json").read_text())["parts"]
    small, large = parts["=2"], parts["64"]
    states = [part["trained"] * 4 for part in (small, large)]  # weights, gradients, two moments
    assert small["runtime"] - large["runtime"] == states[1] - states[0]


def test_one_base_is_there_once(
    tiny_folder: Path, tmp_path: Path, chats: Path, monkeypatch
) -> None:
    """The frozen weights of all runs are the same objects."""
    from llamaweft.recipe import Recipe
    from llamaweft.sweep import Sweep

    monkeypatch.chdir(tmp_path)
    recipe = Recipe.load(write(tmp_path, tiny_folder, chats))
    sweep = Sweep(recipe, {"adapter.r": ["2", "4"]})
    sweep._share(lambda what: None)
    first, second = (run.pipeline.load_model() for run in sweep.runs)
    names = [n for n, m in first.named_modules() if n.endswith("base_layer")]
    assert len(names) == 14
    for name in names:
        assert first.get_submodule(name).weight is second.get_submodule(name).weight
    assert first.model.embed_tokens.weight is second.model.embed_tokens.weight
