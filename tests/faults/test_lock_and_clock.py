"""The lock of a run folder dies with its process, and the time of day is nothing that a run goes
by."""

from __future__ import annotations

import multiprocessing
import random
import time
from pathlib import Path

import pytest
from kills import write_files

from llamaweft.errors import UserError
from llamaweft.recipe import Recipe
from llamaweft.train.metrics import read_metrics
from llamaweft.train.run_folder import RunFolder
from llamaweft.verify.compare import compare_runs
from llamaweft.verify.part import Part


def hold(folder: Path, connection) -> None:
    run = RunFolder(folder)  # which holds the lock
    run.lock()
    connection.send("held")
    time.sleep(600)


def test_two_runs_on_one_folder_are_refused_until_the_first_one_is_dead(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    here, there = context.Pipe()
    process = context.Process(target=hold, args=(tmp_path / "run", there), daemon=True)
    process.start()
    assert here.recv() == "held"
    with pytest.raises(UserError, match="another process is running"):
        RunFolder(tmp_path / "run").lock()
    process.kill()
    process.join()
    RunFolder(tmp_path / "run").lock()


def test_a_clock_that_jumps_changes_nothing(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe.load(write_files(tmp_path, tiny_folder, max_steps=2, max_seconds=3600))
    Part(recipe).train()
    jumps, clock, clock_ns = random.Random(0), time.time, time.time_ns
    monkeypatch.setattr(time, "time", lambda: clock() + jumps.uniform(-1e5, 1e5))
    monkeypatch.setattr(time, "time_ns", lambda: clock_ns() + jumps.randrange(-(10**14), 10**14))
    Part(recipe.overridden({"output_dir": str(tmp_path / "jumping")})).train()
    comparison = compare_runs(tmp_path / "whole", tmp_path / "jumping", 0)
    assert comparison.steps == 2
    assert not comparison.differences
    records = read_metrics(tmp_path / "jumping/metrics.jsonl")
    assert all(0 < r["seconds"] < 60 for r in records if r["kind"] == "train")
