"""What goes wrong on one rank is the matter of all: a loss that is no number, a rank that lags, a
rank that no longer answers; and sharded states in the host's memory change nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from byte_tokens import byte_tokenizer
from conftest import write_recipe
from ranked import HERE, free_port, furthest, losses, rank_env, run_cases, trained
from safetensors.torch import load_file, save_file

from llamaweft.model.init import init_random
from llamaweft.pipeline import Pipeline
from llamaweft.recipe import Recipe
from llamaweft.train.metrics import read_metrics

TOLERANCE = 1e-5
LOST_SECONDS = 30
"""Within which a run ends everywhere once a rank no longer answers."""

SPOILT = "~"
LAYOUTS = {"data": {"data": 2}, "shard": {"shard": 2}}


@pytest.fixture(scope="module")
def byte_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a vocabulary of bytes."""
    folder = tmp_path_factory.mktemp("models")
    byte_tokenizer().save_pretrained(folder / "bytes")
    init_random("tiny", folder / "tiny", str(folder / "bytes"), "fp32", seed=1)
    return folder / "tiny"


@pytest.fixture
def tree(recipe_tree: dict, byte_folder: Path) -> dict:
    """Short steps of two packs, which one process and two take alike."""
    recipe_tree["model"] = str(byte_folder)
    recipe_tree["training"] |= {
        "learning_rate": 1e-4,
        "adam_epsilon": 1e-6,  # else the sign of what is rounding alone decides some updates
        "memory_budget": "4GiB",  # of the process that runs all tests, too
    }
    return recipe_tree


def alone(tree: dict, folder: Path) -> tuple[Pipeline, Path]:
    pipeline = Pipeline(Recipe.validate_tree(tree | {"output_dir": str(folder)}))
    pipeline.train()
    return pipeline, folder


def check_equal(run: Path, single: Path) -> None:
    for kind in ("train", "validation"):  # steps that are left out have none
        ours, theirs = ([x for x in losses(of, kind) if x is not None] for of in (run, single))
        assert ours == pytest.approx(theirs, rel=TOLERANCE), run.name
    far, name = furthest(trained(run), trained(single))
    assert far < TOLERANCE, f"{run.name}: {name}"


# --- a loss that is no number -------------------------------------------------------------------


@pytest.fixture
def spoilt_tree(tree: dict, tmp_path: Path) -> dict:
    """A model in which one byte means not-a-number, and one row of eight that says it."""
    folder = tmp_path / "spoilt"
    shutil.copytree(tree["model"], folder)
    tensors = load_file(folder / "model.safetensors")
    (spoilt,) = byte_tokenizer()(SPOILT, add_special_tokens=False)["input_ids"]
    tensors["model.embed_tokens.weight"][spoilt] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    rows = Path(tree["data"]["train"][0]["path"])
    lines = rows.read_text(encoding="utf-8").splitlines()
    held = tmp_path / "held.jsonl"
    held.write_text("\n".join(lines[24:]) + "\n", encoding="utf-8")
    lines[4] = json.dumps({"messages": [
        {"role": "user", "content": f"What does {SPOILT} mean?"},
        {"role": "assistant", "content": "About so many."},
    ]})  # fmt: skip
    rows.write_text("\n".join(lines[:8]) + "\n", encoding="utf-8")
    tree["model"] = str(folder)
    tree["data"]["validation"] = {"path": str(held)}
    tree["training"] |= {"max_steps": 10, "checkpoint_every_steps": 10}
    return tree


def test_a_loss_that_is_none_on_one_rank_is_none_on_all(spoilt_tree: dict, tmp_path: Path) -> None:
    pipeline, single = alone(spoilt_tree, tmp_path / "alone")
    runs = {name: tmp_path / name for name in LAYOUTS}
    run_cases(
        2,
        [
            {"recipe": spoilt_tree | {"output_dir": str(runs[name])}, "layout": layout}
            for name, layout in LAYOUTS.items()
        ],
        tmp_path,
    )
    skipped = [r["step"] for r in read_metrics(single / "metrics.jsonl") if r.get("skipped")]
    assert 0 < len(skipped) < 9
    for step in skipped:  # one of the step's two packs, so one rank's
        said = [
            any(d.where.endswith("line 5") for d in p)
            for p in pipeline.loader.documents_of(step - 1)
        ]
        assert sorted(said) == [False, True]
    for run in runs.values():
        steps = [r for r in read_metrics(run / "metrics.jsonl") if r["kind"] == "train"]
        assert [r["step"] for r in steps] == list(range(1, 11))
        assert [r["step"] for r in steps if r["skipped"]] == skipped
        kept = [json.loads(line) for line in (run / "quarantine.jsonl").read_text().splitlines()]
        assert [line["step"] for line in kept] == skipped
        for line in kept:
            assert "nan" in line["left_out_because"]
            (row,) = line["rows"]
            assert row["where"].endswith("chats.jsonl line 5")
        check_equal(run, single)


# --- a rank that lags, a rank that no longer answers --------------------------------------------


@contextmanager
def two_ranks(recipe: Path, *overrides: str, slow: float = 0.0) -> Iterator[list[subprocess.Popen]]:
    """The ranks of a run, the second slower by so many seconds a pack; nothing of them is left."""
    command, port = ("train", str(recipe), "parallel.data=2", *overrides), free_port()
    ranks = [
        subprocess.Popen(
            [sys.executable, str(HERE / "slow_rank.py"), str(slow * rank), *command],
            env=rank_env(rank, 2, port),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


def said_by(rank: subprocess.Popen, seconds: float) -> str:
    """What it says until its end, in one line."""
    return " ".join(rank.communicate(timeout=seconds)[1].split())


def test_a_rank_that_lags_is_named(tree: dict, tmp_path: Path) -> None:
    recipe = write_recipe(tree, tmp_path / "recipe.yaml")
    steps = ("training.max_steps=12", "evaluation.every_steps=null")
    with two_ranks(recipe, *steps, slow=0.5) as ranks:
        first, second = (said_by(rank, 120) for rank in ranks)
        assert [rank.returncode for rank in ranks] == [0, 0], first + second
    assert "rank 1 keeps the others waiting" in first
    assert "rank 0 keeps the others waiting" not in first
    assert "keeps the others waiting" not in second  # it is said once


@pytest.mark.parametrize("stopped", [1, 0])
def test_a_rank_that_no_longer_answers_is_named(stopped: int, tree: dict, tmp_path: Path) -> None:
    """Its process stands still and its connections stay open, as those of a dead link do."""
    recipe = write_recipe(tree, tmp_path / "recipe.yaml")
    endless = (
        "training.max_steps=100000",
        "evaluation.every_steps=null",
        "parallel.timeout_seconds=5",
    )
    with two_ranks(recipe, *endless) as ranks:
        began = time.monotonic()
        while not (tmp_path / "run" / "checkpoints" / "step-000004").exists():
            assert time.monotonic() - began < 120
            time.sleep(0.05)
        os.kill(ranks[stopped].pid, signal.SIGSTOP)
        said = said_by(ranks[1 - stopped], LOST_SECONDS)
        assert ranks[1 - stopped].returncode == 1, said
        assert f"rank {stopped}" in said.partition("error:")[2]
        assert "no longer answers" in said
        assert "--resume" in said
        os.kill(ranks[stopped].pid, signal.SIGCONT)  # it finds itself alone
        assert ranks[stopped].wait(timeout=LOST_SECONDS) == 1


# --- states in the host's memory ----------------------------------------------------------------


def test_offloaded_states_learn_the_same(tree: dict, tmp_path: Path) -> None:
    tree["training"] |= {"max_steps": 4, "gradient_accumulation_steps": 4}
    full = tree | {"adapter": {"method": "none"}, "output_dir": str(tmp_path / "full")}
    del full["base_weights"]
    lora = tree | {"base_weights": "nf4", "output_dir": str(tmp_path / "lora")}
    layout = {"shard": 2, "offload": True}
    run_cases(2, [{"recipe": one, "layout": layout} for one in (full, lora)], tmp_path)
    for one in (full, lora):
        run = Path(one["output_dir"])
        check_equal(run, alone(one, tmp_path / f"{run.name}-alone")[1])
