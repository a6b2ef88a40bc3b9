"""Training that is killed at random moments, and always goes on as if it had not been."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from kills import Killing, write_files

from llamaweft import pipeline
from llamaweft.files import check_recorded
from llamaweft.recipe import Recipe
from llamaweft.train.run_folder import RunFolder

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are copied (forkserver)")


@pytest.mark.parametrize("kills", [5, pytest.param(200, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_at_random_moments_is_the_uninterrupted_one(
    tiny_folder: Path, tmp_path: Path, kills: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
    figures = Killing(write_files(tmp_path, tiny_folder), kills, seed=0)()
    assert figures.kills >= kills
    assert figures.identical == figures.runs >= 1
    assert figures.inside_write >= kills // 10, figures


class KilledError(BaseException):
    """Stands for a kill: nothing after it runs."""


@pytest.mark.parametrize("written", [0, 1, 2, 3])
def test_a_start_that_was_cut_short_is_made_again(
    tiny_folder: Path, tmp_path: Path, written: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After so many of the files that a run begins with."""
    recipe = Recipe.load(write_files(tmp_path, tiny_folder, max_steps=1))
    left = [written]

    def killed(real):
        def write(*arguments) -> None:
            if not left[0]:
                raise KilledError
            left[0] -= 1
            real(*arguments)

        return write

    with monkeypatch.context() as patch:
        for name in ("write_recorded", "write_json"):
            patch.setattr(pipeline, name, killed(getattr(pipeline, name)))
        with pytest.raises(KilledError):
            pipeline.Pipeline(recipe).train()
    assert pipeline.Pipeline(recipe).train(resume=True)["reason"] == "finished"
    folder = RunFolder(tmp_path / "whole")
    started = (folder.recipe, folder.environment, folder.audit, folder.plan)
    assert all(path.exists() for path in started)
    check_recorded(*started)
