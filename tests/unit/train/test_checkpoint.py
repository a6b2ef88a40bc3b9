"""Checkpoints: everything comes back, damage is found, only the newest stay."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from llamaweft.errors import RunError, UserError
from llamaweft.train.checkpoint import (
    LoopState,
    Snapshot,
    complete_checkpoints,
    forget_after,
    load_checkpoint,
    save_checkpoint,
    set_damaged_aside,
)


def snapshot(step: int) -> Snapshot:
    before = {"metrics": {}, "answers": []}
    state = LoopState(
        step,
        best_value=0.5,
        best_step=3,
        best_metrics={"loss": {"value": 0.5}},
        without_gain=1,
        before=before,
        loss_scale=2.0**15,
        steps_at_loss_scale=4,
    )
    trained = {"a": torch.randn(3, 2), "b": torch.randn(4)}
    return Snapshot(state, trained, {"a:exp_avg": torch.randn(3, 2), "a:step": torch.tensor(7.0)})


def test_all_of_it_comes_back(tmp_path: Path) -> None:
    saved = snapshot(7)
    random.gauss(0, 1)  # leaves half a pair inside the generator
    folder = save_checkpoint(tmp_path, saved, keep=2)
    drawn = (random.gauss(0, 1), np.random.rand(), torch.rand(1))
    for seed in range(3):
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
    loaded = load_checkpoint(folder)
    assert loaded.state == saved.state
    for ours, theirs in ((loaded.trained, saved.trained), (loaded.optimizer, saved.optimizer)):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert (random.gauss(0, 1), np.random.rand(), torch.rand(1)) == drawn


@pytest.mark.parametrize("name", ["trained.safetensors", "rng.safetensors", "state.json"])
def test_a_flipped_bit_is_found(name: str, tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, snapshot(1), keep=1)
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} is damaged"):
        load_checkpoint(folder)


def test_a_missing_file_is_found(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, snapshot(1), keep=1)
    (folder / "optimizer.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be read"):
        load_checkpoint(folder)


def test_the_newest_stay_and_half_written_ones_do_not_count(tmp_path: Path) -> None:
    (tmp_path / ".step-000009.tmp").mkdir()
    for step in (1, 2, 10):
        save_checkpoint(tmp_path, snapshot(step), keep=2)
    assert [p.name for p in complete_checkpoints(tmp_path)] == ["step-000002", "step-000010"]


def test_the_order_of_checkpoints_is_that_of_the_run(tmp_path: Path) -> None:
    """Beyond a million steps, and within one, too."""
    for step, packs_done in ((999_999, 0), (999_999, 11), (1_000_000, 0), (999_999, 2)):
        saved = snapshot(step)
        saved.state.packs_done = packs_done
        save_checkpoint(tmp_path, saved, keep=9)
    (tmp_path / "step-000003.copy").mkdir()
    names = [path.name for path in complete_checkpoints(tmp_path)]
    assert names == [
        *("step-999999", "step-999999-pack-002", "step-999999-pack-011", "step-1000000")
    ]
    forget_after(tmp_path, tmp_path / "step-999999-pack-002")
    assert len(complete_checkpoints(tmp_path)) == 2


def test_what_a_killed_process_left_is_put_back_or_deleted(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, snapshot(step), keep=9)
    (tmp_path / "step-000003").rename(tmp_path / ".step-000003.old")  # and the new one not there
    (tmp_path / "step-000001").rename(tmp_path / ".step-000001.gone")
    (tmp_path / ".step-000004.tmp").mkdir()
    assert set_damaged_aside(tmp_path) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "step-000003"]


def test_where_the_disk_is_full_those_that_were_there_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = save_checkpoint(tmp_path, snapshot(1), keep=1)

    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llamaweft.train.checkpoint.save_file", fails)
    with pytest.raises(RunError, match="step-000002 cannot be written: No space left"):
        save_checkpoint(tmp_path, snapshot(2), keep=1)
    assert list(tmp_path.iterdir()) == [before]
    load_checkpoint(before)


def test_no_file_is_a_pickle(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, snapshot(1), keep=1)
    assert {p.suffix for p in folder.iterdir()} == {".safetensors", ".json"}
