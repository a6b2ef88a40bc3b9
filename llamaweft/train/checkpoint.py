"""Checkpoints: complete or absent, checksummed, without pickles.

checkpoints/step-000100/ holds trained.safetensors, optimizer.safetensors, rng.safetensors,
state.json and checksums.json; step-000100-pack-003/, made by a stop in the midst of the step after
it, has gradients.safetensors and rng_at_start.safetensors too. Each is written aside, flushed to
the disk and renamed.

Where several ranks hold parts of a tensor, each writes its own into trained/ and optimizer/
(parallel/parts.py); what every rank has, or holds a cut of, the first one writes whole. So a
checkpoint says nothing of the ranks that wrote it, and any number of them goes on from it.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llamaweft.errors import RunError, UserError
from llamaweft.files import put_back, remove, take_place
from llamaweft.parallel.parts import is_in_parts, outlines, read_parts, write_parts
from llamaweft.parallel.ranks import ALONE, Ranks
from llamaweft.train.guard import GuardState
from llamaweft.train.optim import empty_optimizer_state

TRAINED, OPTIMIZER, RNG = "trained.safetensors", "optimizer.safetensors", "rng.safetensors"
GRADIENTS, RNG_AT_START = "gradients.safetensors", "rng_at_start.safetensors"
TRAINED_PARTS, OPTIMIZER_PARTS = "trained", "optimizer"
STATE, CHECKSUMS = "state.json", "checksums.json"
DAMAGED = ".damaged-"
START = "start"
NAME = re.compile(r"step-([0-9]{6,})(?:-pack-([0-9]{3,}))?")


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
    packs_done, loss_so_far: of the next step, where the loop was stopped in its midst.
    validation_due: whether the validation after `step` was not done. guard: what the guard carries.
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
    packs_done: int = 0
    loss_so_far: float = 0.0
    validation_due: bool = False
    guard: GuardState = field(default_factory=GuardState)

    @property
    def name(self) -> str:
        """Of its checkpoint; names are in the order of the run."""
        within = f"-pack-{self.packs_done:03d}" if self.packs_done else ""
        return f"step-{self.step:06d}{within}"

    @classmethod
    def from_dict(cls, found: Any) -> LoopState:
        """What `dataclasses.asdict` gave. Raises ValueError for anything else."""
        if not isinstance(found, dict) or not isinstance(found.get("guard", {}), dict):
            raise ValueError("it holds no state of a loop")
        guard = found.get("guard", {})
        for kind, values in ((cls, found), (GuardState, guard)):
            if unknown := values.keys() - {field.name for field in fields(kind)}:
                raise ValueError(f"{min(unknown)} is no part of a loop's state")
        try:
            state: LoopState = TypeAdapter(cls).validate_json(json.dumps(found), strict=True)
        except ValidationError as error:
            wrong = error.errors(include_url=False, include_input=False)[0]
            name = ".".join(map(str, wrong["loc"]))
            raise ValueError(f"{name} of its state makes no sense ({wrong['msg']})") from None
        return state


@dataclass(frozen=True)
class Snapshot:
    """Everything that the next step depends on. gradients: of the packs that are done already,
    where the loop was stopped in the midst of a step; random_at_start: the random state when that
    step began, from which it is taken again should memory run out."""

    state: LoopState
    trained: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    gradients: dict[str, Tensor] = field(default_factory=dict)
    random_at_start: dict[str, Tensor] = field(default_factory=dict)
    folder: Path | None = None
    """Where it was read from: what several ranks wrote is an outline in it, without numbers."""

    @torch.no_grad()
    def restore(
        self,
        kept: dict[str, Tensor],
        optimizer: torch.optim.Optimizer,
        parameters: dict[str, nn.Parameter],
        ranks: Ranks,
    ) -> None:
        """Fill the tensors of a model and the state of its optimizer, of several ranks what this
        one holds of them. All ranks must call it."""
        moments = empty_optimizer_state(optimizer, parameters, self.optimizer)
        for found, tensors, subfolder in (
            (self.trained, kept, TRAINED_PARTS),
            (self.optimizer, moments, OPTIMIZER_PARTS),
        ):
            whole = {name: value for name, value in found.items() if not value.is_meta}
            for name, value in whole.items():
                if name in tensors:
                    ranks.fill(name.partition(":")[0], tensors[name], value)
            parts = {n: tensors[n] for n in found.keys() - whole.keys() if n in tensors}
            if parts:
                assert self.folder is not None
                read_parts(self.folder / subfolder, parts)


def save_checkpoint(
    folder: Path,
    snapshot: Snapshot,
    keep: int,
    *,
    as_start: bool = False,
    ranks: Ranks = ALONE,
) -> Path:
    """Write the snapshot with the state of every random generator as a folder of `folder`, and
    delete all but the newest `keep` checkpoints and the newest good one. All ranks must call it.

    as_start: write it as what the guard may go back to while there is no other; no run is resumed
    from there. Raises RunError where it cannot be written; those that were there stay.
    """
    target = folder / (START if as_start else snapshot.state.name)
    aside = folder / f".{target.name}.tmp"
    try:
        if ranks.first:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        ranks.barrier()
        _write(aside, snapshot, ranks)
        if ranks.first:
            take_place(aside, target)
            good = good_checkpoints(folder)[-1:]
            for old in [*complete_checkpoints(folder)[:-keep], *folder.glob(START)]:
                if old not in good:
                    remove(old)
        ranks.barrier()
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        raise RunError(
            f"the checkpoint {target} cannot be written: {reason}; make room, then go on from the "
            "one before it with --resume"
        ) from None
    return target


def _write(folder: Path, snapshot: Snapshot, ranks: Ranks) -> None:
    for tensors, file, subfolder in (
        (snapshot.trained, TRAINED, TRAINED_PARTS),
        (snapshot.optimizer, OPTIMIZER, OPTIMIZER_PARTS),
    ):
        in_parts = {name: t for name, t in tensors.items() if is_in_parts(t)}
        whole = {
            name: ranks.whole(name.partition(":")[0], tensor)
            for name, tensor in tensors.items()
            if name not in in_parts
        }
        if in_parts:
            write_parts(folder / subfolder, in_parts)
        if ranks.first:
            save_file(_plain(whole), folder / file)
    random_states = ranks.gather(random_state())
    if not ranks.first:
        return
    save_file(_of_ranks(random_states), folder / RNG)
    if snapshot.gradients:
        save_file(_plain(snapshot.gradients), folder / GRADIENTS)
        save_file(snapshot.random_at_start, folder / RNG_AT_START)
    (folder / STATE).write_text(json.dumps(asdict(snapshot.state), indent=2))
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    sums = {path.relative_to(folder).as_posix(): _sha256(path) for path in files}
    (folder / CHECKSUMS).write_text(json.dumps(sums, indent=2))
    for path in [*folder.rglob("*"), folder]:
        _fsync(path)


def _of_ranks(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The first rank's random state under its own names, those of others with their number."""
    named = dict(states[0])
    for rank, state in enumerate(states[1:], 1):
        named |= {f"{name}@{rank}": tensor for name, tensor in state.items()}
    return named


def _of_rank(states: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    """A rank's random state; where there were fewer ranks, that of the first."""
    suffix = f"@{rank}"
    own = {n.removesuffix(suffix): t for n, t in states.items() if n.endswith(suffix)}
    return own or {name: tensor for name, tensor in states.items() if "@" not in name}


def complete_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, the oldest first. What was being written is not among them."""
    named = [(NAME.fullmatch(path.name), path) for path in folder.glob("step-*")]
    places = [(int(found[1]), int(found[2] or 0), path) for found, path in named if found]
    return [path for _, _, path in sorted(places)]


def good_checkpoints(folder: Path) -> list[Path]:
    """What the guard may go back to, the oldest first: the start, and checkpoints that were not
    made after steps that it left out."""
    saved = [*folder.glob(START), *complete_checkpoints(folder)]
    return [path for path in saved if not read_state(path).guard.skipped_in_a_row]


def set_damaged_aside(folder: Path) -> list[str]:
    """Look through the checkpoints from the newest on, and rename each that is damaged so that it
    no longer counts, until one is sound. Returns what was wrong, a sentence for each.

    Raises UserError when none is sound although there are some.
    """
    _tidy(folder)
    found, checkpoints = [], complete_checkpoints(folder)
    for checkpoint in reversed(checkpoints):
        if (problem := what_is_wrong(checkpoint)) is None:
            break
        found.append(problem)
    if found and len(found) == len(checkpoints):
        raise UserError(
            f"{found[0]}, and no other checkpoint is sound; delete {folder} to start the run anew"
        )
    for checkpoint in checkpoints[len(checkpoints) - len(found) :]:
        aside = checkpoint.with_name(f"{DAMAGED}{checkpoint.name}")
        shutil.rmtree(aside, ignore_errors=True)
        checkpoint.rename(aside)
    return found


def _tidy(folder: Path) -> None:
    """Bring back what a killed process was replacing, and delete what it was writing or deleting.
    The run's lock must be held."""
    for old in folder.glob(".step-*.old"):
        put_back(old.with_name(old.name.removeprefix(".").removesuffix(".old")))
    for left in folder.glob(".step-*"):
        shutil.rmtree(left, ignore_errors=True)


def what_is_wrong(folder: Path) -> str | None:
    """Why a checkpoint cannot be used: a file is missing, or has not its checksum. None if it
    can."""
    try:
        sums = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        if not isinstance(sums, dict) or not {TRAINED, OPTIMIZER, RNG, STATE} <= sums.keys():
            return f"the checkpoint {folder} cannot be read: {CHECKSUMS} does not name its files"
        for name, digest in sums.items():
            if Path(name).is_absolute() or ".." in Path(name).parts:
                return f"the checkpoint {folder} cannot be read: {CHECKSUMS} names {name!r}"
            if _sha256(folder / name) != digest:
                return f"{folder / name} is damaged (its checksum is wrong)"
        read_state(folder)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return f"the checkpoint {folder} cannot be read: {reason}"
    return None


def read_state(folder: Path) -> LoopState:
    """The state of a checkpoint, unproven. Raises OSError, ValueError or TypeError."""
    return LoopState.from_dict(json.loads((folder / STATE).read_text(encoding="utf-8")))


_UNREADABLE = (SafetensorError, LookupError, ValueError, TypeError, RuntimeError, ArithmeticError)


def load_checkpoint(folder: Path, ranks: Ranks = ALONE) -> Snapshot:
    """Read a checkpoint and put every random generator back. Tensors that several ranks wrote are
    outlines, without numbers, until they are restored.

    Raises UserError when a file is missing or does not have its checksum.
    """
    if problem := what_is_wrong(folder):
        raise UserError(f"{problem}; delete {folder} to resume from the checkpoint before it")
    try:
        partial, before = folder / GRADIENTS, folder / RNG_AT_START
        if before.exists():
            restore_random_state(load_file(before))  # so that it is known to be one
        restore_random_state(_of_rank(load_file(folder / RNG), ranks.rank))
        return Snapshot(
            read_state(folder),
            load_file(folder / TRAINED) | outlines(folder / TRAINED_PARTS),
            load_file(folder / OPTIMIZER) | outlines(folder / OPTIMIZER_PARTS),
            load_file(partial) if partial.exists() else {},
            load_file(before) if before.exists() else {},
            folder,
        )
    except _UNREADABLE as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"the checkpoint {folder} cannot be read: {reason}") from None


def forget_after(folder: Path, checkpoint: Path) -> None:
    """Delete the checkpoints that are newer than `checkpoint`."""
    every = complete_checkpoints(folder)
    after = every.index(checkpoint) + 1 if checkpoint in every else 0
    for newer in every[after:]:
        remove(newer)


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
