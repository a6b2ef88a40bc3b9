"""Experiment trackers, through Accelerate: tensorboard, trackio, wandb."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llamaweft.errors import UserError
from llamaweft.train.events import Ended, Event, StepEnded, Validated


def check_installed(names: Sequence[str]) -> None:
    """Raises UserError when a tracker's package is missing."""
    for name in names:
        if find_spec(name) is None:
            raise UserError(
                f"training.report_to: {name} is not installed; `pip install {name}`, or remove it"
            )


class Trackers:
    """A listener that writes each step and validation to the named trackers."""

    def __init__(
        self, names: Sequence[str], folder: Path, config: dict[str, str | int | float]
    ) -> None:
        """folder: where trackers that write files put them. config: the recipe, flat."""
        from accelerate import Accelerator  # slow to import, and most runs have no tracker

        self._accelerator: Any = Accelerator(cpu=True, log_with=list(names), project_dir=folder)
        self._accelerator.init_trackers("llamaweft", config=config)

    def __call__(self, event: Event) -> None:
        match event:
            case StepEnded(step=step):
                values = {k: v for k, v in asdict(event).items() if k != "step"}
                self._accelerator.log({f"train/{k}": v for k, v in values.items()}, step=step)
            case Validated(step=step, metrics=metrics):
                values = {f"validation/{name}": value for name, value in metrics.items()}
                self._accelerator.log(values, step=step)
            case Ended():
                self._accelerator.end_training()
