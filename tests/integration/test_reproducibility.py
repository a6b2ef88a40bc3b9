"""The same seed, recipe and machine give the same bits, in any process; other numbers of threads and
other packs the same numbers but for the order in which they are added."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import write_recipe
from safetensors.torch import load_file

from llamaweft.pipeline import Pipeline
from llamaweft.recipe import Recipe

LOSS_TOLERANCE = 1e-5
WEIGHT_TOLERANCE = 1e-4
"""Relative, after five steps in fp32 at a learning rate of 1e-4; AdamW divides a gradient by its
own size, so what differs in the last bit of a small gradient shows in the weights first."""

ROWS, TOKENS = 8, 32


@pytest.fixture(scope="module")
def recipe_of_all_rows(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every step sees every row: texts of 31 digits, a token each, and the end."""
    tmp_path = tmp_path_factory.mktemp("reproducibility")
    draw = random.Random(0)
    texts = ["".join(draw.choices("0123456789", k=TOKENS - 1)) for _ in range(ROWS)]
    (tmp_path / "digits.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    tree = {
        "model": str(tiny_folder),
        "task": "text",
        "data": {"train": str(tmp_path / "digits.jsonl"), "validation": None},
        "adapter": {"r": 4, "lora_dropout": 0.0},
        "base_weights": "fp32",
        "training": {
            "max_steps": 5,
            "learning_rate": 1e-4,
            "micro_batch_tokens": ROWS * TOKENS // 2,
            "gradient_accumulation_steps": 2,
            "compute_dtype": "fp32",
            "device": "cpu",
        },
        "output_dir": str(tmp_path / "run"),
    }
    return write_recipe(tree, tmp_path / "recipe.json")


def left_by(folder: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The loss of each step, and the trained weights."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if record["kind"] == "train"]
    assert len(losses) == 5
    return losses, load_file(folder / "adapter/adapter_model.safetensors")


def trained(recipe: Path, name: str, *overrides: str, threads: int = 1):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        folder = recipe.parent / name
        Pipeline(Recipe.load(recipe, [*overrides, f"output_dir={folder}"])).train()
    finally:
        torch.set_num_threads(before)
    return left_by(folder)


@pytest.fixture(scope="module")
def first(recipe_of_all_rows: Path):
    """The run that the others are compared with, on one thread."""
    return trained(recipe_of_all_rows, "first")


def test_the_same_run_in_another_process_has_the_same_bits(recipe_of_all_rows: Path, first) -> None:
    losses, weights = first
    folder = recipe_of_all_rows.parent / "there"
    subprocess.run(
        [sys.executable, "-m", "llamaweft", "train", recipe_of_all_rows, f"output_dir={folder}"],
        check=True,
        capture_output=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    other_losses, other_weights = left_by(folder)
    assert losses == other_losses
    assert weights.keys() == other_weights.keys()
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)


@pytest.mark.parametrize(
    ("overrides", "threads"),
    [
        ((), 2),
        (("training.micro_batch_tokens=64", "training.gradient_accumulation_steps=4"), 1),
        (("training.micro_batch_tokens=256", "training.gradient_accumulation_steps=1"), 1),
    ],
    ids=["threads", "smaller-packs", "larger-packs"],
)
def test_threads_and_packs_change_the_last_digits_only(
    recipe_of_all_rows: Path, first, overrides: tuple[str, ...], threads: int, tmp_path: Path
) -> None:
    losses, weights = first
    name = str(tmp_path / "other")
    other_losses, other_weights = trained(recipe_of_all_rows, name, *overrides, threads=threads)
    assert other_losses == pytest.approx(losses, rel=LOSS_TOLERANCE)
    for name, tensor in weights.items():
        assert (tensor - other_weights[name]).norm() <= WEIGHT_TOLERANCE * tensor.norm(), name


def test_another_seed_is_another_run(recipe_of_all_rows: Path, first) -> None:
    other, _ = trained(recipe_of_all_rows, "seed", "training.seed=1")
    assert first[0] != pytest.approx(other, rel=LOSS_TOLERANCE)
