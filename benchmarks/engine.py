"""llamaweft as a contender: a recipe, run by the pipeline as `llamaweft train` runs it.

python -m benchmarks.engine '{"model": ..., "chats": ..., "pack_tokens": 1024, ...}'
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass
from typing import Any

from benchmarks.step_server import StepServer
from llamaweft.pipeline import Pipeline
from llamaweft.recipe import Recipe
from llamaweft.train.events import Event, StepEnded, StopRequest

MANY_STEPS = 100_000
"""More than are ever asked for."""


@dataclass(frozen=True)
class Settings:
    """model: a Hugging Face folder. chats: JSONL. accumulation: packs in a step. memory_budget:
    as the recipe's key."""

    model: str
    chats: str
    pack_tokens: int
    accumulation: int
    base_weights: str
    memory_budget: str | None = None
    compute_dtype: str = "fp32"
    seed: int = 0

    def recipe(self, output_dir: str) -> Recipe:
        """The recipe. What it leaves out is llamaweft's default: r 16, alpha 32, all-linear."""
        training: dict[str, Any] = {
            "learning_rate": 2e-4,
            "max_steps": MANY_STEPS,
            "micro_batch_tokens": self.pack_tokens,
            "gradient_accumulation_steps": self.accumulation,
            "compute_dtype": self.compute_dtype,
            "device": "cpu",
            "memory_budget": self.memory_budget,
            "checkpoint_every_steps": MANY_STEPS,
            "seed": self.seed,
        }
        return Recipe.validate_tree(
            {
                "model": self.model,
                "data": {
                    "train": self.chats,
                    "validation": None,
                    "max_length_tokens": self.pack_tokens,
                },
                "base_weights": self.base_weights,
                "training": training,
                "output_dir": output_dir,
            }
        )


class Turnstile:
    """A listener that lets one step through for each `go`."""

    def __init__(self, server: StepServer, stop: StopRequest) -> None:
        self.server, self.stop = server, stop

    def __call__(self, event: Event) -> None:
        if not isinstance(event, StepEnded):
            return
        going_on = self.server.step_ended(
            real_tokens=event.tokens,
            computed_tokens=event.computed_tokens,
            trained_tokens=event.trained_tokens,
            useful_flops=event.useful_flops_per_second * event.seconds,
            loss=event.loss,
        )
        if not going_on:
            self.stop("the benchmark is over")


def main() -> None:
    server, stop = StepServer(), StopRequest()
    settings = Settings(**json.loads(sys.argv[1]))
    with tempfile.TemporaryDirectory() as folder:
        pipeline = Pipeline(settings.recipe(f"{folder}/run"))
        pipeline.train(listeners=[Turnstile(server, stop)], stop=stop)


if __name__ == "__main__":
    main()
