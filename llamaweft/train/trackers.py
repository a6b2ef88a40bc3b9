"""Experiment trackers, through Accelerate: tensorboard, trackio, wandb."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from llamaweft.errors import UserError
from llamaweft.train.events import Ended, Event, StepEnded, Validated


class Trackers:
    """A listener that writes each step and validation to the named trackers."""

    def __init__(self, names: list[str], folder: Path, config: dict[str, Any]) -> None:
        """`folder`: where trackers that write files put them. `config`: the recipe, flat.

        Raises UserError when a tracker is not installed.
        """
        try:
            self._accelerator = Accelerator(cpu=True, log_with=names, project_dir=folder)
        except (ValueError, ImportError):
            missing = ", ".join(names)
            raise UserError(
                f"training.report_to: {missing} is not installed; pip install it or remove it"
            ) from None
        if len(self._accelerator.log_with) != len(names):
            raise UserError(
                f"training.report_to: not all of {', '.join(names)} are installed; "
                "pip install them or remove them"
            )
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
