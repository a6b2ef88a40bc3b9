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
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from llamaweft.errors import RunError
from llamaweft.runtime import anon_bytes, device_bytes, rss_bytes
from llamaweft.train.checkpoint import LoopState, Snapshot, load_checkpoint, save_checkpoint
from llamaweft.train.events import (
    Announcer,
    CheckpointSaved,
    Ended,
    Started,
    StepEnded,
    StopRequest,
    Validated,
)
from llamaweft.train.in_backward import InBackward
from llamaweft.train.optim import (
    load_optimizer_state,
    load_scaler_state,
    optimizer_state,
    scaler_state,
    set_learning_rate,
)
from llamaweft.train.schedule import LearningRate

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


class PackLike(Protocol):
    """What the loop needs to know of a micro-batch."""

    label_weight_N: Tensor

    document_tokens: int

    @property
    def tokens(self) -> int: ...

    @property
    def trained_tokens(self) -> int: ...

    def to(self, device: torch.device) -> PackLike: ...


class LoaderLike(Protocol):
    total_steps: int

    def steps(self, start_step: int = 0) -> Iterator[list[Any]]: ...


@dataclass(frozen=True)
class Settings:
    """Numbers of the recipe that the loop itself needs."""

    checkpoints: Path
    checkpoint_every_steps: int
    save_total_limit: int
    evaluate_every_steps: int | None
    early_stopping_patience: int | None
    max_grad_norm: float | None
    best_metric: str | None
    early_stopping_min_gain: float = 0.0
    max_seconds: float | None = None
    stops_over_budget: bool = False


@dataclass
class Loop:
    """objective: a pack -> (weighted sum of losses, sum of weights).
    constants: tensors that stay as they are, and are saved since they would not be found again.
    evaluator: () -> {metric: {"value": ..., ...}}, or None where nothing is held out.
    keep_best: called when the weights are the best so far.
    within_budget: whether what the evaluator gave allows the weights to be the best.
    useful_flops: base matmul FLOPs that a list of packs needs.
    scaler: of fp16's gradients; a disabled one changes nothing.
    in_backward: steps the optimizer while gradients are computed; None: after that.
    began: when the run was started, by time.perf_counter; max_seconds counts from there.
    away_seconds: how long others had the device between two turns; no time of this run.
    """

    model: nn.Module
    parameters: dict[str, nn.Parameter]
    objective: Callable[[Any], tuple[Tensor, Tensor]]
    loader: LoaderLike
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    learning_rate: LearningRate
    evaluator: Callable[[], dict[str, dict[str, float]]] | None
    keep_best: Callable[[], None]
    useful_flops: Callable[[list[Any]], float]
    settings: Settings
    announce: Announcer
    stop: StopRequest
    device: torch.device
    state: LoopState
    began: float = field(default_factory=time.perf_counter)
    within_budget: Callable[[dict[str, dict[str, float]]], bool] = lambda metrics: True
    longest: dict[str, float] = field(default_factory=dict)
    away_seconds: float = 0.0
    in_backward: InBackward | None = None
    constants: dict[str, Tensor] = field(default_factory=dict)

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Remember how long the block took, if it is the longest of its kind."""
        began = self._clock()
        yield
        self.longest[what] = max(self.longest.get(what, 0), self._clock() - began)

    def _clock(self) -> float:
        """Seconds, without those that others had the device."""
        return time.perf_counter() - self.away_seconds

    def _turn(self) -> Iterator[None]:
        """Let others have the device, if there are any."""
        left = time.perf_counter()
        yield
        self.away_seconds += time.perf_counter() - left

    def resume(self, checkpoint: Path) -> None:
        """Put weights, optimizer, loss scale, position and random generators back."""
        snapshot = load_checkpoint(checkpoint)
        with torch.no_grad():
            for name, tensor in (self.parameters | self.constants).items():
                tensor.copy_(snapshot.trained[name])
        load_optimizer_state(self.optimizer, self.parameters, snapshot.optimizer)
        self.state = snapshot.state
        load_scaler_state(self.scaler, self.state.loss_scale, self.state.steps_at_loss_scale)

    def run(self) -> str:
        """Train to the end, to an early stop, to max_seconds or to a stop request; returns which
        it was.

        The last step is validated and saved. A stop request only saves, so that the resumed run
        validates at the same steps as one that was never stopped.
        """
        return exhausted(self.turns())

    def turns(self) -> Generator[None, None, str]:
        """`run`, which pauses after each micro-batch: several loops can share a device."""
        self.announce(Started(self.state.step, self.loader.total_steps))
        self.model.train()
        done = self.state.step == self.loader.total_steps
        ended = None if done else self._ended_early()  # it stays so when it is resumed
        reason, last = ended or FINISHED, ended is not None
        steps = self.loader.steps(self.state.step)
        while self.state.step < self.loader.total_steps and not last:
            began = self._clock()
            with self.timed("step"):
                yield from self._step([pack.to(self.device) for pack in next(steps)], began)
            last = self.state.step == self.loader.total_steps
            if not last and self._is_out_of_time():
                reason, last = OUT_OF_TIME, True
            if self._is_due(self.settings.evaluate_every_steps, last):
                with self.timed("validation"):
                    self._validate()
                if (ended := self._ended_early()) and not last:
                    reason, last = ended, True
            if self.stop.reason and not last:
                reason, last = self.stop.reason, True
            if self._is_due(self.settings.checkpoint_every_steps, last):
                with self.timed("saving"):
                    self._save()
        if self.state.best_step is None:
            self.keep_best()
        self.announce(Ended(self.state.step, reason))
        return reason

    def _step(self, packs: list[PackLike], began: float) -> Iterator[None]:
        """Sum, count, divide once: the loss is the mean over the whole global batch."""
        count = torch.stack([pack.label_weight_N.sum() for pack in packs]).sum()
        loss, rate = 0.0, self.learning_rate(self.state.step + 1)
        set_learning_rate(self.optimizer, rate)
        for pack in packs:
            total, _ = self.objective(pack)
            mean = total / count
            self.scaler.scale(mean).backward()
            loss += mean.item()
            yield from self._turn()
        self.state.step += 1
        norm = self._update() if self.in_backward is None else self.in_backward.norm()
        seconds = self._clock() - began
        tokens = sum(pack.document_tokens for pack in packs)
        self.announce(
            StepEnded(
                step=self.state.step,
                loss=loss,
                lr=rate,
                grad_norm=norm,
                tokens=tokens,
                computed_tokens=sum(pack.tokens for pack in packs),
                trained_tokens=sum(pack.trained_tokens for pack in packs),
                seconds=seconds,
                tokens_per_second=tokens / seconds,
                useful_flops_per_second=self.useful_flops(packs) / seconds,
                anon_bytes=anon_bytes(),
                rss_bytes=rss_bytes(),
                device_bytes=device_bytes(self.device),
            )
        )

    def _update(self) -> float:
        """Clip the gradient, step, forget it; returns its norm before clipping.

        Where fp16 overflowed the norm is not finite, the weights stay and the loss scale is
        halved. Raises RunError when that happens without any scale too.
        """
        self.scaler.unscale_(self.optimizer)
        limit = self.settings.max_grad_norm
        norm = nn.utils.clip_grad_norm_(
            self.parameters.values(), float("inf") if limit is None else limit
        )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.state.loss_scale, self.state.steps_at_loss_scale = scaler_state(self.scaler)
        if self.state.loss_scale is not None and self.state.loss_scale < 1:
            raise RunError(
                f"training.compute_dtype: fp16 cannot hold the numbers of step {self.state.step}, "
                "even with its loss unscaled; start a new run with fp32, or with bf16 where the "
                "device is fast in it"
            )
        return norm.item()

    def _is_due(self, every: int | None, last: bool) -> bool:
        return last or (every is not None and self.state.step % every == 0)

    def _validate(self) -> None:
        if self.evaluator is None:
            return
        metrics = self.evaluator()
        self.model.train()
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
        return self._clock() - self.began + needed > self.settings.max_seconds

    def _ended_early(self) -> str | None:
        """Why the last validation ends the run; None where it does not."""
        if self.state.over_budget:
            return FORGETTING
        patience = self.settings.early_stopping_patience
        exhausted = patience is not None and self.state.without_gain >= patience
        return EARLY_STOPPING if exhausted else None

    def _save(self) -> None:
        snapshot = Snapshot(
            self.state,
            {name: t.detach() for name, t in (self.parameters | self.constants).items()},
            optimizer_state(self.optimizer, self.parameters),
        )
        folder = save_checkpoint(
            self.settings.checkpoints, snapshot, self.settings.save_total_limit
        )
        self.announce(CheckpointSaved(self.state.step, folder))
