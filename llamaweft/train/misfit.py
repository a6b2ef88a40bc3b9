"""Whether a checkpoint is one of the run that is to go on from it.

Checksums prove that its files are those that were written, not who wrote them: a checkpoint of
another run, or one that was made by hand, has them too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from llamaweft.errors import UserError
from llamaweft.train.checkpoint import LoopState, Snapshot
from llamaweft.train.optim import LIKE_THE_WEIGHTS

WHOLE = ({"step", "exp_avg", "exp_avg_sq"}, {"step", "state1", "state2"}, {"momentum_buffer"})
"""The moments of a weight that belong together, in AdamW, in 8 bit, in gradient descent."""


def check_fits(
    snapshot: Snapshot,
    folder: Path,
    *,
    kept: Mapping[str, Tensor],
    trained: Mapping[str, Tensor],
    total_steps: int,
) -> None:
    """Raises UserError where the snapshot in `folder` is none of a run of `total_steps` steps that
    keeps these tensors and trains some of them."""
    problem = (
        _tensors(snapshot.trained, kept)
        or _gradients(snapshot.gradients, trained)
        or _moments(snapshot.optimizer, trained)
        or _start(snapshot)
        or _position(snapshot.state, total_steps)
    )
    if problem is not None:
        raise UserError(
            f"the checkpoint {folder} is none of this run: {problem}; delete it to go on from the "
            "one before, or give the output_dir of the run that wrote it"
        )


def _tensors(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str | None:
    if unknown := sorted(found.keys() ^ wanted.keys()):
        return f"{unknown[0]} is in one of them only"
    for name, tensor in wanted.items():
        if found[name].shape != tensor.shape:
            return f"{name} has the shape {tuple(found[name].shape)}, not {tuple(tensor.shape)}"
        if found[name].dtype != tensor.dtype:
            return f"{name} holds {found[name].dtype}, not {tensor.dtype}"
    return None


def _gradients(found: Mapping[str, Tensor], trained: Mapping[str, Tensor]) -> str | None:
    if unknown := sorted(found.keys() - trained.keys()):
        return f"it has a gradient of {unknown[0]}, which is not trained"
    return _tensors(found, {name: trained[name] for name in found})


def _moments(found: Mapping[str, Tensor], trained: Mapping[str, Tensor]) -> str | None:
    for key, tensor in found.items():
        name, _, moment = key.rpartition(":")
        if name and name not in trained:
            return f"its optimizer has a moment of {name}, which is not trained"
        if moment in LIKE_THE_WEIGHTS and tensor.shape != trained[name].shape:
            return f"{key} has the shape {tuple(tensor.shape)}, not {tuple(trained[name].shape)}"
        if moment in LIKE_THE_WEIGHTS and not tensor.is_floating_point():
            return f"{key} holds {tensor.dtype}"
        if moment == "step" and tensor.numel() != 1:
            return f"{key} is no number"
    for name in trained:
        held = {key.rpartition(":")[2] for key in found if key.startswith(f"{name}:")}
        if held and not any(whole <= held for whole in WHOLE):
            return f"its optimizer has {', '.join(sorted(held))} alone of {name}"
    return None


def _start(snapshot: Snapshot) -> str | None:
    """What a step that was begun must be begun with again."""
    if snapshot.gradients and not snapshot.random_at_start:
        return "it has gradients, and not the random state that their step began with"
    return None


def _position(state: LoopState, total_steps: int) -> str | None:
    if not 0 <= state.step <= total_steps:
        return f"it is at step {state.step} of {total_steps}"
    if state.packs_done < 0 or state.without_gain < 0:
        return "it counts below 0"
    if not math.isfinite(state.guard.learning_rate_factor):
        return f"its learning rate is multiplied by {state.guard.learning_rate_factor}"
    return None
