"""Measures a run's model at its evaluations, and keeps its best weights with their answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from llamaweft.data.general import General
from llamaweft.evaluate.evaluator import Evaluator
from llamaweft.evaluate.forgetting import ForgettingGuard
from llamaweft.evaluate.head_evaluator import HeadEvaluator
from llamaweft.model.llama import Model
from llamaweft.parallel.ranks import Ranks
from llamaweft.recipe import Recipe
from llamaweft.train.checkpoint import LoopState
from llamaweft.train.events import StopRequest
from llamaweft.train.loop import FORGETTING
from llamaweft.train.run_folder import RunFolder

GENERAL_ANSWERS = "general_answers"
"""Where what is measured of the untouched model holds its answers to general prompts."""

Progress = Callable[[int, int], None]


class Judged(Protocol):
    """What the judge needs to know of a pipeline."""

    @property
    def recipe(self) -> Recipe: ...

    @property
    def run_folder(self) -> RunFolder: ...

    @property
    def general(self) -> General | None: ...

    @property
    def evaluator(self) -> Evaluator | HeadEvaluator | None: ...

    @property
    def stop(self) -> StopRequest: ...

    @property
    def ranks(self) -> Ranks: ...

    def save_trained(self, model: Model) -> None: ...


class Judge:
    """Measures the model as it is, on held-out rows and general prompts.

    progress: (done, of all) answers. guard: compares with the model as the run began, once that is
    there. latest, best: what was measured last, and of the weights that were kept.
    """

    def __init__(self, pipeline: Judged, model: Model, progress: Progress | None) -> None:
        self.pipeline, self.model, self.progress = pipeline, model, self._unless_stopped(progress)
        self.guard: ForgettingGuard | None = None
        self.state: Callable[[], LoopState] = LoopState
        """Of the loop that asks."""
        self.latest: dict[str, Any] | None = None
        self.best: dict[str, Any] | None = None

    def _unless_stopped(self, progress: Progress | None) -> Progress:
        """`progress`, which ends the measuring once the run is asked to stop."""

        def told(done: int, total: int) -> None:
            self.pipeline.stop.check()
            if progress is not None:
                progress(done, total)

        return told

    @property
    def measures(self) -> bool:
        """Whether there is anything to measure on."""
        return self.pipeline.evaluator is not None or self.pipeline.general is not None

    @property
    def bounded(self) -> bool:
        """Whether there is a budget of forgetting."""
        forgetting = self.pipeline.recipe.forgetting
        return forgetting is not None and forgetting.max_kl is not None

    @property
    def stops_over_budget(self) -> bool:
        forgetting = self.pipeline.recipe.forgetting
        return self.bounded and forgetting is not None and forgetting.when_exceeded == "stop"

    def within_budget(self, metrics: dict[str, dict[str, float]]) -> bool:
        return self.guard is None or self.guard.within(metrics)

    def measured(self) -> dict[str, Any]:
        """{"metrics": ..., "answers": ..., "parts": ...} of the model as it is."""
        if self.pipeline.evaluator is None:
            return {"metrics": {}, "answers": [], "parts": {}}
        return self.pipeline.evaluator.measure(self.model, self.progress)

    def untouched(self, known: dict[str, Any] | None) -> dict[str, Any]:
        """What is measured before the first step, with the model's answers to general prompts.
        known: what that gave for the same model and rows."""
        before = self.measured() if known is None else known
        if self.guard is not None and GENERAL_ANSWERS not in before:
            before = before | {GENERAL_ANSWERS: self.guard.answers(self.model, self.progress)}
        return before

    def forgotten(self, reason: str) -> dict[str, Any]:
        """What evaluation.json says of forgetting, of the weights that were kept."""
        assert self.guard is not None
        assert self.best is not None
        state = self.state()
        found = self.best["forgetting"]
        content = self.guard.content(found, state.before[GENERAL_ANSWERS], found["answers"])
        stopped = state.step if reason == FORGETTING else None
        return content | {"step": state.best_step, "stopped_at_step": stopped}

    def measured_with_guard(self) -> dict[str, Any]:
        """`measured`, and under "forgetting" what the guard measures, if there is one."""
        found = self.measured()
        if self.guard is not None:
            answers = self.guard.answers(self.model, self.progress)
            found["forgetting"] = self.guard.measure(self.model) | {"answers": answers}
        return found

    def __call__(self) -> dict[str, dict[str, float]]:
        """The metrics at an evaluation; answers to general prompts go to the run folder."""
        self.latest = self.measured_with_guard()
        if self.guard is None:
            return self.latest["metrics"]
        found, state = self.latest["forgetting"], self.state()
        if found["answers"] and self.pipeline.ranks.first:
            pairs = self.guard.side_by_side(state.before[GENERAL_ANSWERS], found["answers"])
            self.pipeline.run_folder.record_answers(state.step, pairs)
        return self.latest["metrics"] | found["metrics"]

    def keep_best(self) -> None:
        self.best = self.latest
        self.pipeline.save_trained(self.model)
