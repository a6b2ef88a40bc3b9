"""What a run writes."""

from __future__ import annotations

from llamaweft.model.presets import parameter_count
from llamaweft.pieces.fitted import Fitted
from llamaweft.plan.memory import kept_start_numbers, trained_parameter_count
from llamaweft.train.optim import optimizer_bytes_per_parameter


def disk_bytes(pieces: Fitted) -> int:
    """What checkpoints (weights and two moments each), the result and the logs will need."""
    training, trained = pieces.recipe.training, trained_parameter_count(pieces.workload)
    weights = 4 * (trained + kept_start_numbers(pieces.workload))
    moments = optimizer_bytes_per_parameter(training.optimizer) * trained
    checkpoints = int((training.save_total_limit + 1) * (weights + moments))
    result = weights if pieces.lora is not None else 4 * parameter_count(pieces.config)
    return checkpoints + 2 * result + pieces.workload.forgetting_bytes + 16 * 2**20
