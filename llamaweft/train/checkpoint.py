"""Checkpoints: complete or absent, checksummed, without pickles.

checkpoints/step-000100/ holds trained.safetensors, optimizer.safetensors, rng.safetensors,
state.json and checksums.json. It is written aside, flushed to the disk and renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llamaweft.errors import UserError

TRAINED, OPTIMIZER, RNG = "trained.safetensors", "optimizer.safetensors", "rng.safetensors"
STATE, CHECKSUMS = "state.json", "checksums.json"


@dataclass
class LoopState:
    """What the loop carries from step to step besides tensors.

    step: finished steps. best_value, best_step, best_metrics: the best validation so far.
    gained_value: the value at the last gain that early stopping counts; without_gain: validations
    since. before: metrics of the untouched model. over_budget: whether the last validation was,
    where that ends the run.
    loss_scale: what fp16 multiplies the loss by, or None for another dtype.
    steps_at_loss_scale: steps that were taken since it changed.
    schedule: what is kept for the backward pass, as plan/memory.py writes it.
    """

    step: int = 0
    best_value: float | None = None
    best_step: int | None = None
    best_metrics: dict[str, Any] = field(default_factory=dict)
    gained_value: float | None = None
    without_gain: int = 0
    before: dict[str, Any] = field(default_factory=dict)
    over_budget: bool = False
    loss_scale: float | None = None
    steps_at_loss_scale: int = 0
    schedule: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Snapshot:
    """Everything that the next step depends on."""

    state: LoopState
    trained: dict[str, Tensor]
    optimizer: dict[str, Tensor]


def save_checkpoint(folder: Path, snapshot: Snapshot, keep: int) -> Path:
    """Write `folder`/step-NNNNNN with the state of every random generator, and delete all but
    the newest `keep` checkpoints."""
    target = folder / f"step-{snapshot.state.step:06d}"
    aside = folder / f".{target.name}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    save_file(_plain(snapshot.trained), aside / TRAINED)
    save_file(_plain(snapshot.optimizer), aside / OPTIMIZER)
    save_file(random_state(), aside / RNG)
    (aside / STATE).write_text(json.dumps(asdict(snapshot.state), indent=2))
    sums = {path.name: _sha256(path) for path in sorted(aside.iterdir())}
    (aside / CHECKSUMS).write_text(json.dumps(sums, indent=2))
    for path in [*aside.iterdir(), aside]:
        _fsync(path)
    shutil.rmtree(target, ignore_errors=True)
    aside.rename(target)
    _fsync(folder)
    for old in complete_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def complete_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, the oldest first. What was being written is not among them."""
    return sorted(folder.glob("step-*"))


def load_checkpoint(folder: Path) -> Snapshot:
    """Read a checkpoint and put every random generator back.

    Raises UserError when a file is missing or does not have its checksum.
    """
    try:
        sums = json.loads((folder / CHECKSUMS).read_text())
        damaged = [name for name, digest in sums.items() if _sha256(folder / name) != digest]
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"the checkpoint {folder} cannot be read: {error}") from None
    if damaged:
        raise UserError(
            f"{folder / damaged[0]} is damaged (its checksum is wrong); delete {folder} to resume "
            "from the checkpoint before it"
        )
    restore_random_state(load_file(folder / RNG))
    state = LoopState(**json.loads((folder / STATE).read_text()))
    return Snapshot(state, load_file(folder / TRAINED), load_file(folder / OPTIMIZER))


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def random_state() -> dict[str, Tensor]:
    """The state of every random generator."""
    _, keys, gauss = random.getstate()
    _, np_keys, np_position, np_has_gauss, np_gauss = np.random.get_state(legacy=True)
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(keys, dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(np.asarray(np_keys).astype(np.int64)),
        "numpy_rest": torch.tensor([np_position, np_has_gauss, np_gauss], dtype=torch.float64),
    }
    for index in range(torch.cuda.device_count()):
        state[f"cuda:{index}"] = torch.cuda.get_rng_state(index)
    return state


def restore_random_state(state: dict[str, Tensor]) -> None:
    """Put back what `random_state` gave."""
    torch.set_rng_state(state["torch"])
    gauss = state["python_gauss"].tolist()
    random.setstate((3, tuple(state["python"].tolist()), gauss[0] if gauss else None))
    position, has_gauss, np_gauss = state["numpy_rest"].tolist()
    keys = state["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, int(position), int(has_gauss), np_gauss))
    for index in range(torch.cuda.device_count()):
        if f"cuda:{index}" in state:
            torch.cuda.set_rng_state(state[f"cuda:{index}"], index)


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
