"""Runs through a row that gives no number: it is left out and kept, and what is learnt is sound."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import write_recipe
from safetensors.torch import load_file, save_file

from llamaweft.errors import RunError
from llamaweft.train.metrics import read_metrics

SPOILT = "xylophone"


@pytest.fixture
def spoilt_recipe(recipe_tree: dict, tiny_folder: Path, tokenizer, tmp_path: Path) -> dict:
    """A model in which one token means not-a-number, and a row that says it."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    tensors = load_file(folder / "model.safetensors")
    ids = tokenizer(f" {SPOILT}", add_special_tokens=False)["input_ids"]
    tensors["model.embed_tokens.weight"][ids[0]] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    rows = Path(recipe_tree["data"]["train"][0]["path"])
    held = tmp_path / "held.jsonl"
    shutil.copy(rows, held)
    lines = rows.read_text(encoding="utf-8").splitlines()
    said = json.dumps({"messages": [
        {"role": "user", "content": f"Do you play the {SPOILT}?"},
        {"role": "assistant", "content": "No."},
    ]})  # fmt: skip
    lines[4] = said
    rows.write_text("\n".join(lines[:8]) + "\n", encoding="utf-8")
    held.write_text("\n".join(held.read_text(encoding="utf-8").splitlines()[20:]) + "\n")
    recipe_tree["model"] = str(folder)
    recipe_tree["data"]["validation"] = {"path": str(held)}
    recipe_tree["training"] |= {
        "micro_batch_tokens": 64,
        "gradient_accumulation_steps": 1,
        "max_steps": 10,
    }
    return recipe_tree


def test_the_run_goes_on_without_the_row_and_keeps_it(
    spoilt_recipe: dict, tmp_path: Path, command
) -> None:
    command("train", write_recipe(spoilt_recipe, tmp_path / "recipe.yaml"))
    run = tmp_path / "run"
    lines = [json.loads(line) for line in (run / "quarantine.jsonl").read_text().splitlines()]
    assert lines
    for line in lines:
        assert "nan" in line["left_out_because"]
        (row,) = line["rows"]
        assert row["where"].endswith("chats.jsonl line 5")
        assert SPOILT in row["text"]
    steps = [r for r in read_metrics(run / "metrics.jsonl") if r["kind"] == "train"]
    skipped = [r["step"] for r in steps if r["skipped"]]
    assert skipped == [line["step"] for line in lines]
    assert [r["loss"] is None for r in steps] == [r["skipped"] for r in steps]
    assert 0 < len(skipped) < 5
    adapter = load_file(run / "adapter/adapter_model.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in adapter.values())


def test_a_resumed_run_writes_the_same_quarantine(
    spoilt_recipe: dict, tmp_path: Path, command, monkeypatch
) -> None:
    """Killed after a step that was left out, and resumed from a checkpoint before it."""
    from llamaweft.train.quarantine import QuarantineFile

    path = write_recipe(spoilt_recipe, tmp_path / "recipe.yaml")
    command("train", path, "output_dir=whole")
    expected = (tmp_path / "whole/quarantine.jsonl").read_text()

    def killed(self, event) -> None:
        real(self, event)
        if self.path.exists():
            raise RunError("killed")

    real = QuarantineFile.__call__
    with monkeypatch.context() as patch:
        patch.setattr(QuarantineFile, "__call__", killed)
        command("train", path, "output_dir=killed", code=1)
    command("train", path, "output_dir=killed", "--resume")
    assert (tmp_path / "killed/quarantine.jsonl").read_text() == expected
    ends = [load_file(tmp_path / name / "checkpoints/step-000010/trained.safetensors")
            for name in ("whole", "killed")]  # fmt: skip
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_where_every_step_is_left_out_the_run_ends_with_one_sentence(
    spoilt_recipe: dict, tmp_path: Path, command
) -> None:
    rows = Path(spoilt_recipe["data"]["train"][0]["path"])
    lines = [line for line in rows.read_text(encoding="utf-8").splitlines() if SPOILT in line]
    rows.write_text(lines[0] + "\n", encoding="utf-8")
    spoilt_recipe["guard"] = {"max_skipped_steps": 2, "max_returns": 1}
    path = write_recipe(spoilt_recipe, tmp_path / "recipe.yaml")
    said = command("train", path, code=1)
    assert "left out 2 steps in a row after going back 1 times" in said
    assert "quarantine.jsonl names the rows" in said


def test_keys_that_a_stop_would_ignore_are_refused(
    spoilt_recipe: dict, tmp_path: Path, command
) -> None:
    spoilt_recipe["guard"] = {"then": "stop", "max_returns": 1}
    path = write_recipe(spoilt_recipe, tmp_path / "recipe.yaml")
    assert "max_returns would be ignored beside then: stop" in command("train", path, code=2)


def test_a_changed_recipe_is_said_or_refused(spoilt_recipe: dict, tmp_path: Path, command) -> None:
    path = write_recipe(spoilt_recipe, tmp_path / "recipe.yaml")
    command("train", path)
    said = command("train", path, "--resume", "training.max_steps=9", "training.seed=3", code=2)
    assert "training.max_steps: 10 -> 9; training.seed: 0 -> 3" in said
    command("train", path, "--resume", "training.save_total_limit=5")
    saved = (tmp_path / "run/recipe.yaml").read_text()
    assert "save_total_limit: 5" in saved


def test_memory_that_runs_out_for_good_is_one_sentence(
    recipe_tree: dict, tmp_path: Path, command, monkeypatch
) -> None:
    from llamaweft.model.llama import LlamaForCausalLM

    def failing(self, pack):
        raise MemoryError

    monkeypatch.setattr(LlamaForCausalLM, "loss", failing)
    path = write_recipe(recipe_tree, tmp_path / "recipe.yaml")
    said = command("train", path, code=1)
    assert "memory ran out in step 1" in said
    assert "chats.jsonl line" in said
