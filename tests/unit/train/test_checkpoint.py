"""Checkpoints: everything comes back, damage is found, only the newest stay."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from llamaweft.errors import UserError
from llamaweft.train.checkpoint import (
    LoopState,
    Snapshot,
    complete_checkpoints,
    load_checkpoint,
    save_checkpoint,
)


def snapshot(step: int) -> Snapshot:
    before = {"metrics": {}, "answers": []}
    state = LoopState(step, 0.5, 3, {"loss": {"value": 0.5}}, 1, before, 2.0**15, 4)
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


def test_no_file_is_a_pickle(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, snapshot(1), keep=1)
    assert {p.suffix for p in folder.iterdir()} == {".safetensors", ".json"}
