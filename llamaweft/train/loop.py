"""The one training loop.

Everything it works with is handed to it. A method is a transformation of the model or an
objective, never a second loop.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from torch import Tensor, nn

from llamaweft.errors import RunError
from llamaweft.train.checkpoint import (
    Snapshot,
    complete_checkpoints,
    forget_after,
    good_checkpoints,
    load_checkpoint,
    random_state,
    restore_random_state,
    save_checkpoint,
)
from llamaweft.train.events import (
    CheckpointSaved,
    Ended,
    InterruptedByRequest,
    Started,
    Validated,
    WentBack,
)
from llamaweft.train.misfit import check_fits
from llamaweft.train.optim import load_scaler_state, optimizer_state
from llamaweft.train.step import PackLike, Stepper

LOWER_IS_BETTER = ("loss", "perplexity", "mae")
Result = TypeVar("Result")

FINISHED, EARLY_STOPPING, OUT_OF_TIME = "finished", "early_stopping", "max_seconds"
FORGETTING = "forgetting"
COMPLETE = (FINISHED, EARLY_STOPPING, OUT_OF_TIME, FORGETTING)
"""Reasons why a run that is over needs no more steps."""


def exhausted(turns: Generator[None, None, Result]) -> Result:
    """What a generator returns after its last turn."""
    while True:
        try:
            next(turns)
        except StopIteration as ended:
            result: Result = ended.value
            return result


@dataclass(kw_only=True)
class Loop(Stepper):
    """Steps, validations and checkpoints (what a step needs: Stepper).

    constants: tensors that stay as they are, and are saved since they would not be found again.
    evaluator: () -> {metric: {"value": ..., ...}}, or None where nothing is held out.
    keep_best: called when the weights are the best so far.
    within_budget: whether what the evaluator gave allows the weights to be the best.
    began: when the run was started, by time.perf_counter; max_seconds counts from there.
    """

    model: nn.Module
    evaluator: Callable[[], dict[str, dict[str, float]]] | None
    keep_best: Callable[[], None]
    began: float = field(default_factory=time.perf_counter)
    within_budget: Callable[[dict[str, dict[str, float]]], bool] = lambda metrics: True
    longest: dict[str, float] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Remember how long the block took, if it is the longest of its kind."""
        began = self._clock()
        yield
        self.longest[what] = max(self.longest.get(what, 0), self._clock() - began)

    def resume(self, checkpoint: Path) -> None:
        """Put weights, optimizer, loss scale, position and random generators back. Raises UserError
        for a checkpoint that cannot be read or is none of this run."""
        snapshot = load_checkpoint(checkpoint, self.ranks)
        kept = self.parameters | self.constants
        check_fits(
            snapshot,
            checkpoint,
            kept=self.ranks.outlines(kept),
            trained=self.ranks.outlines(self.parameters),
            total_steps=self.loader.total_steps,
        )
        snapshot.restore(kept, self.optimizer, self.parameters, self.ranks)
        self.state, self.random_at_start = snapshot.state, snapshot.random_at_start
        load_scaler_state(self.scaler, self.state.loss_scale, self.state.steps_at_loss_scale)
        self.optimizer.zero_grad(set_to_none=True)
        for name, gradient in snapshot.gradients.items():
            self.parameters[name].grad = gradient.to(self.parameters[name].device)

    def run(self) -> str:
        """Train to the end, to an early stop, to max_seconds or to a stop request; returns which
        it was.

        The last step is validated and saved. A stop request only saves, in the midst of a step or
        of a validation too, so that the resumed run is one that was never stopped.
        """
        return exhausted(self.turns())

    def turns(self) -> Generator[None, None, str]:
        """`run`, which pauses after each micro-batch: several loops can share a device."""
        self.announce(Started(self.state.step, self.loader.total_steps))
        self.model.train()
        if self.settings.guard.goes_back and not complete_checkpoints(self.settings.checkpoints):
            self._save(as_start=True)  # the first good state
        ended = self._over()  # it stays so when it is resumed
        steps = self._steps()
        while ended is None:
            out_of_time, was_due = False, self.state.validation_due
            if not was_due:
                began = self._clock()
                with self.timed("step"):
                    yield from self._step([pack.to(self.device) for pack in next(steps)], began)
                if self._must_go_back():
                    self._go_back()
                    steps = self._steps()
                    continue
                last = self.state.step == self.loader.total_steps
                within = self.state.packs_done > 0
                out_of_time = not last and not within and self._is_out_of_time()
                self.state.validation_due = not within and self._is_due(
                    self.settings.evaluate_every_steps, last or out_of_time
                )
            if self.state.validation_due:
                with self.timed("validation"):
                    self._validate()
            ended = self._ended(out_of_time)
            caught_up = was_due and not self.state.validation_due  # so that it is done once
            if self._saves(ended is not None or caught_up):
                with self.timed("saving"):
                    self._save()
        if self.state.best_step is None:
            self.keep_best()
        self.announce(Ended(self.state.step, ended))
        return ended

    def _steps(self) -> Iterator[list[PackLike]]:
        """This rank's packs of the steps to come."""
        ranks = self.ranks
        if ranks.alone:
            return self.loader.steps(self.state.step)
        return self.loader.steps(self.state.step, ranks.pack_index, ranks.layout.pack_ranks)

    def _over(self) -> str | None:
        """Why there is no step to take; None where there is, or a validation to do."""
        if self.state.validation_due:
            return None
        done = self.state.step == self.loader.total_steps
        return FINISHED if done else self._ended_early()

    def _ended(self, out_of_time: bool) -> str | None:
        """Why the loop ends here; None where it goes on."""
        if self.state.validation_due or self.state.packs_done > 0:
            return self.stop_reason  # which cut it short
        if self.state.step < self.loader.total_steps and out_of_time:
            return OUT_OF_TIME
        return self._over() or self.stop_reason

    def _must_go_back(self) -> bool:
        limit = self.settings.guard.max_skipped_steps
        return self.weights_harmed or self.state.guard.skipped_in_a_row >= limit

    def _go_back(self) -> None:
        """To the last good state, with a lower learning rate.

        Raises RunError where the recipe wants the run to stop instead, or it went back too often.
        """
        guard, settings, step = self.state.guard, self.settings.guard, self.state.step
        sound = good_checkpoints(self.settings.checkpoints)
        if not settings.goes_back or guard.returns >= settings.max_returns or not sound:
            often = f" after going back {guard.returns} times" if guard.returns else ""
            raise RunError(
                f"the guard left out {guard.skipped_in_a_row} steps in a row{often}, the last one "
                f"is step {step} (quarantine.jsonl names the rows); lower training.learning_rate, "
                "or remove those rows, and start a new run"
            )
        best = self.state
        self.resume(sound[-1])
        if self.ranks.first:
            forget_after(self.settings.checkpoints, sound[-1])
        self.ranks.barrier()
        if best.best_step is not None:  # it lies in the run folder
            self.state.best_value, self.state.best_step = best.best_value, best.best_step
            self.state.best_metrics = best.best_metrics
        self.state.guard = guard.returned(settings, self.state.guard)
        self.state.guard.records += 1
        self.weights_harmed = False
        factor = self.state.guard.learning_rate_factor
        self.announce(WentBack(step, self.state.step, factor))

    def _is_due(self, every: int | None, last: bool) -> bool:
        return last or (every is not None and self.state.step % every == 0)

    def _validate(self) -> None:
        """Measure, and judge the weights by it; a stop request leaves it for the resumed run."""
        if self.evaluator is None:
            self.state.validation_due = False
            return
        random = random_state()
        self.ranks.at(f"the validation after step {self.state.step}")
        try:
            metrics = self.evaluator()
        except InterruptedByRequest:
            restore_random_state(random)
            return
        finally:
            self.model.train()
        self.state.validation_due = False
        value = self._first(metrics)
        within = self.within_budget(metrics)
        best = within and self._gain(value, self.state.best_value) > 0
        self.state.over_budget = self.settings.stops_over_budget and not within
        if best:
            self.keep_best()
            self.state.best_value, self.state.best_step = value, self.state.step
            self.state.best_metrics = metrics
        if self._gain(value, self.state.gained_value) > self.settings.early_stopping_min_gain:
            self.state.gained_value, self.state.without_gain = value, 0
        else:
            self.state.without_gain += 1
        values = {name: metric["value"] for name, metric in metrics.items()}
        self.announce(Validated(self.state.step, values, best))

    def _first(self, metrics: dict[str, dict[str, float]]) -> float:
        """The value that picks the best; without a metric for it, the step: the last is best."""
        metric = self.settings.best_metric
        return float(self.state.step) if metric is None else metrics[metric]["value"]

    def _gain(self, value: float, before: float | None) -> float:
        """How much better a value of the first metric is; minus infinity where it is no number."""
        if math.isnan(value):
            return -math.inf
        if before is None:
            return math.inf
        return before - value if self.settings.best_metric in LOWER_IS_BETTER else value - before

    def _is_out_of_time(self) -> bool:
        """Whether another step, and validating and saving after it, would end too late."""
        if self.settings.max_seconds is None:
            return False
        needed = sum(self.longest.values())
        late = self._clock() - self.began + needed > self.settings.max_seconds
        return self.ranks.from_first(late)

    def _ended_early(self) -> str | None:
        """Why the last validation ends the run; None where it does not."""
        if self.state.over_budget:
            return FORGETTING
        patience = self.settings.early_stopping_patience
        exhausted = patience is not None and self.state.without_gain >= patience
        return EARLY_STOPPING if exhausted else None

    def _saves(self, last: bool) -> bool:
        """Whether to save now: after steps that were left out only at the end, since the guard goes
        back to what is saved."""
        if self.state.guard.skipped_in_a_row and not last:
            return False
        return self._is_due(self.settings.checkpoint_every_steps, last)

    def _save(self, *, as_start: bool = False) -> None:
        snapshot = Snapshot(
            self.state,
            {name: t.detach() for name, t in (self.parameters | self.constants).items()},
            optimizer_state(self.optimizer, self.parameters),
            {n: p.grad for n, p in self.parameters.items() if p.grad is not None},
            self.random_at_start,
        )
        folder = save_checkpoint(
            self.settings.checkpoints,
            snapshot,
            self.settings.save_total_limit,
            as_start=as_start,
            ranks=self.ranks,
        )
        if not as_start:
            self.announce(CheckpointSaved(self.state.step, folder))
