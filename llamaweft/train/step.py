"""One optimizer step: the gradient of a global batch, pack by pack, and the update.

Sum, count, divide once: the loss is the mean over all labels of the step. A step that would do harm
is left out (guard.py), and a pack that is too large for the memory is computed in parts.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from llamaweft.errors import RunError
from llamaweft.parallel.lags import Lags
from llamaweft.parallel.ranks import ALONE, Ranks
from llamaweft.runtime import anon_bytes, device_bytes, rss_bytes
from llamaweft.train.checkpoint import LoopState, random_state, restore_random_state
from llamaweft.train.events import (
    Announcer,
    PacksSplit,
    RankLags,
    StepEnded,
    StepLeftOut,
    StopRequest,
)
from llamaweft.train.guard import (
    GuardSettings,
    HarmError,
    OverBudgetError,
    culprits,
    is_out_of_memory,
    split,
)
from llamaweft.train.in_backward import InBackward
from llamaweft.train.optim import scaler_state, set_learning_rate
from llamaweft.train.schedule import LearningRate

STOPS = (None, "SIGINT", "SIGTERM")
"""What a run of several ranks may be asked to stop by, so that each can tell the others."""

OVER_BUDGET = 1.1
"""How many times its budget a process may hold before packs are split: what plans may be off by."""


class PackLike(Protocol):
    """What the loop needs to know of a micro-batch."""

    label_weight_N: Tensor

    document_tokens: int

    @property
    def tokens(self) -> int: ...

    @property
    def trained_tokens(self) -> int: ...

    def to(self, device: torch.device) -> PackLike: ...

    def weightless(self) -> PackLike:
        """The same micro-batch, none of whose labels counts."""


class LoaderLike(Protocol):
    total_steps: int

    def steps(self, start_step: int = 0, rank: int = 0, ranks: int = 1) -> Iterator[list[Any]]:
        """The packs of each step, of several ranks those of one."""

    def size_of(self, step: int) -> int:
        """Packs of the step after `step` finished ones, of all ranks together."""

    def documents_of(self, step: int) -> list[list[Any]]:
        """Of the step after `step` finished ones: the documents of each pack."""

    @property
    def collate(self) -> Callable[[list[Any]], Any]:
        """A pack of documents."""


@dataclass(frozen=True)
class Settings:
    """Numbers of the recipe that the loop itself needs.

    memory_budget: bytes that the process may hold, where the recipe names them and the device
    shares its memory with the process; None: unknown.
    """

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
    memory_budget: int | None = None
    guard: GuardSettings = field(default_factory=GuardSettings)


@dataclass(frozen=True)
class Totals:
    """Of a step on all ranks. labels: the sum of their weights. tokens: of documents as given."""

    labels: float
    tokens: float
    computed_tokens: float
    trained_tokens: float
    useful_flops: float


@dataclass(kw_only=True)
class Stepper:
    """objective: a pack -> (weighted sum of losses, sum of weights).
    useful_flops: base matmul FLOPs that a list of packs needs.
    scaler: of fp16's gradients; a disabled one changes nothing.
    in_backward: steps the optimizer while gradients are computed; None: after that.
    away_seconds: how long others had the device between two turns; no time of this run.
    weights_harmed: whether a step that did harm was taken in part.
    ranks: this process among those of the run. lags: finds those that keep the others waiting.
    random_at_start: the random state when the step began that is being taken.
    """

    parameters: dict[str, nn.Parameter]
    objective: Callable[[Any], tuple[Tensor, Tensor]]
    loader: LoaderLike
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    learning_rate: LearningRate
    useful_flops: Callable[[list[Any]], float]
    settings: Settings
    announce: Announcer
    stop: StopRequest
    device: torch.device
    state: LoopState
    in_backward: InBackward | None = None
    away_seconds: float = 0.0
    weights_harmed: bool = False
    ranks: Ranks = ALONE
    lags: Lags = field(default_factory=Lags)
    random_at_start: dict[str, Tensor] = field(default_factory=dict)
    _bears_over_budget: bool = False
    _stop_of_all: str | None = None

    def _clock(self) -> float:
        """Seconds, without those that others had the device."""
        return time.perf_counter() - self.away_seconds

    def _turn(self) -> Iterator[None]:
        """Let others have the device, if there are any."""
        left = time.perf_counter()
        yield
        self.away_seconds += time.perf_counter() - left

    @property
    def stop_reason(self) -> str | None:
        """Why the run is to stop, once every rank knows."""
        return self.stop.reason if self.ranks.alone else self._stop_of_all

    def _step(self, packs: list[PackLike], began: float) -> Iterator[None]:
        """Take the step, or leave it out; or, where a stop is asked for, end after a pack, with
        `state.packs_done` above 0. packs: this rank's."""
        self.ranks.at(f"step {self.state.step + 1}")
        totals = self._totals(packs)
        rate = self.learning_rate(self.state.step + 1) * self.state.guard.learning_rate_factor
        set_learning_rate(self.optimizer, rate)
        harm = None
        try:
            computed = self._even(packs)
            yield from self._accumulate_within_memory(computed, totals.labels)
            if self.state.packs_done < len(computed):
                return
            self._hear(self._clock() - began)
            norm = self._update()
        except HarmError as found:
            harm = found
        loss = self.state.loss_so_far if harm is None else harm.loss
        if harm is None:
            self.state.guard.taken(loss)
        else:
            norm = math.nan
            self._leave_out(harm)
        self.state.step += 1
        self.state.packs_done, self.state.loss_so_far = 0, 0.0
        seconds = self._clock() - began
        self.announce(
            StepEnded(
                step=self.state.step,
                loss=loss,
                lr=rate,
                grad_norm=norm,
                tokens=round(totals.tokens),
                computed_tokens=round(totals.computed_tokens),
                trained_tokens=round(totals.trained_tokens),
                seconds=seconds,
                tokens_per_second=totals.tokens / seconds,
                useful_flops_per_second=totals.useful_flops / seconds,
                anon_bytes=anon_bytes(),
                rss_bytes=rss_bytes(),
                device_bytes=device_bytes(self.device),
                skipped=harm is not None,
            )
        )

    # --- the ranks ------------------------------------------------------------------------------

    def _totals(self, packs: list[PackLike]) -> Totals:
        """Of the step's packs on all ranks."""
        return Totals(
            *self.ranks.total(
                [
                    sum(pack.label_weight_N.sum().item() for pack in packs),
                    sum(pack.document_tokens for pack in packs),
                    sum(pack.tokens for pack in packs),
                    sum(pack.trained_tokens for pack in packs),
                    self.useful_flops(packs) if packs else 0.0,
                ]
            )
        )

    def _even(self, packs: list[PackLike]) -> list[PackLike]:
        """As many packs as every rank computes, where ranks wait for each other in each: a rank
        that has fewer computes the step's first one once more, which counts nothing."""
        if not self.ranks.in_step:
            return packs
        turns = math.ceil(self.loader.size_of(self.state.step) / self.ranks.layout.pack_ranks)
        if len(packs) == turns:
            return packs
        again = self._pack(self.loader.documents_of(self.state.step)[0]).weightless()
        return [*packs, again]

    def _hear(self, seconds: float) -> None:
        """Agree with the other ranks on the step's loss and on stopping; raises HarmError on all of
        them where the loss of one is none, or where it is too high. seconds: this rank's work."""
        if self.ranks.alone:
            return
        signal = STOPS.index(self.stop.reason) if self.stop.reason in STOPS else 0
        rows = self.ranks.table([self.state.loss_so_far, signal, seconds])
        place = self.ranks.layout.place
        self.state.loss_so_far = sum(row[0] for n, row in enumerate(rows) if place(n).tensor == 0)
        self._stop_of_all = STOPS[round(max(row[1] for row in rows))]
        if not self.ranks.in_step:
            for rank, times in self.lags.of([row[2] for row in rows]):
                self.announce(RankLags(self.state.step + 1, rank, times))
        self._check_loss(self.state.loss_so_far)

    # --- the gradient ---------------------------------------------------------------------------

    def _accumulate_within_memory(self, packs: list[PackLike], count: float) -> Iterator[None]:
        """Accumulate, and where memory runs out start the step again with smaller packs."""
        if not self.state.packs_done:  # else it is a step that goes on after a stop
            self.random_at_start = random_state()
        while True:
            try:
                yield from self._accumulate(packs, count)
                return
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or self.ranks.in_step:
                    raise
                over_budget, reason = isinstance(error, OverBudgetError), str(error)
            # Only here, since the error holds on to everything that was being computed.
            self.optimizer.zero_grad(set_to_none=True)
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self._shrink_packs(packs[self.state.packs_done], over_budget, reason)
            restore_random_state(self.random_at_start)
            self.state.packs_done, self.state.loss_so_far = 0, 0.0

    def _accumulate(self, packs: list[PackLike], count: float) -> Iterator[None]:
        """Add up the gradients of the packs that are not done yet, and the loss. count: the sum of
        the weights of all labels of the step.

        Raises HarmError before a backward pass from a loss that is none, or too high; of several
        ranks each goes on, so that none waits for it in vain.
        """
        for index in range(self.state.packs_done, len(packs)):
            for part in self._parts(packs[index], index):
                total, _ = self.objective(part)
                mean = total / count
                self._check_budget()
                loss = self.state.loss_so_far + mean.item()
                if self.ranks.alone:
                    self._check_loss(loss)
                self.scaler.scale(mean).backward()
                self.state.loss_so_far = loss
            self.state.packs_done = index + 1
            if self.stop_reason is not None and self.state.packs_done < len(packs):
                return
            yield from self._turn()

    def _check_loss(self, loss: float) -> None:
        """Losses only add up, so one that is too high already is so for the whole step."""
        highest = self.state.guard.highest_loss(self.settings.guard)
        if not math.isfinite(loss):
            raise HarmError(f"the loss is {loss}", loss)
        if loss > highest:
            raise HarmError(f"the loss, {loss:.4g}, is a spike (above {highest:.4g})", loss)

    # --- memory ---------------------------------------------------------------------------------

    def _parts(self, pack: PackLike, index: int) -> list[PackLike]:
        """The pack with this index in the step, or what it is cut into."""
        tokens = self.state.guard.split_over_tokens
        if tokens is None or pack.tokens <= tokens or self.ranks.in_step:
            return [pack]
        documents = self._documents(index)
        return [self._pack(part) for part in split(documents, tokens)]

    def _documents(self, index: int) -> list[Any]:
        """Of this rank's pack with this index in the step."""
        every = self.loader.documents_of(self.state.step)
        documents: list[Any] = every[self.ranks.pack_index :: self.ranks.layout.pack_ranks][index]
        return documents

    def _pack(self, documents: list[Any]) -> PackLike:
        pack: PackLike = self.loader.collate(documents)
        return pack.to(self.device)

    def _check_budget(self) -> None:
        """Raises OverBudgetError where the process holds far more than the recipe allows. Between
        the forward and the backward pass all that is kept is there."""
        budget = self.settings.memory_budget
        borne = self._bears_over_budget or self.ranks.in_step
        if budget is None or borne or self.in_backward is not None:
            return
        if (held := anon_bytes()) > OVER_BUDGET * budget:
            raise OverBudgetError(
                f"{held / 2**20:.0f} MiB are held, training.memory_budget is "
                f"{budget / 2**20:.0f} MiB"
            )

    def _shrink_packs(self, pack: PackLike, over_budget: bool, reason: str) -> None:
        """Have packs as large as this one computed in smaller parts from now on.

        Raises RunError where there is nothing to split and the allocator failed; what is over the
        recipe's budget alone is borne then.
        """
        guard = self.state.guard
        documents = self._documents(self.state.packs_done)
        before = guard.split_over_tokens or pack.tokens
        parts = split(documents, before)
        tokens = max(sum(len(d.ids) for d in part) for part in parts) // 2
        if self.in_backward is None and len(split(documents, tokens)) > len(parts):
            guard.split_over_tokens = tokens
            self.announce(PacksSplit(self.state.step, tokens, reason))
            return
        if over_budget:
            self._bears_over_budget = True
            return
        longest = max(documents, key=lambda document: len(document.ids))
        if self.in_backward is not None:
            cure = "a pack cannot be split under training.optimizer_in_backward; lower "
            cure += "training.micro_batch_tokens, or remove that key"
        else:
            cure = f"the longest document, {longest.where} with {len(longest.ids)} tokens, cannot "
            cure += "be split; lower data.max_length_tokens or training.memory_budget"
        raise RunError(
            f"memory ran out in step {self.state.step + 1} and {cure}; --resume goes on from the "
            "newest checkpoint"
        )

    # --- the update -----------------------------------------------------------------------------

    def _update(self) -> float:
        """Clip the gradient, step, forget it; returns its norm before clipping.

        Where fp16 overflowed the norm is not finite, the weights stay and the loss scale is
        halved; without a scaler, HarmError is raised and the weights stay too. Raises RunError when
        fp16 overflows without any scale.
        """
        if self.in_backward is not None:
            harmed, norm = self.in_backward.harmed, self.in_backward.norm()
            if harmed:
                raise HarmError(
                    f"the gradient's norm is {norm}", self.state.loss_so_far, weights_changed=True
                )
            return norm
        self.ranks.sum_gradients(self.parameters)
        self.scaler.unscale_(self.optimizer)
        norm = self._clip(self.settings.max_grad_norm)
        if not self.scaler.is_enabled() and not math.isfinite(norm):
            raise HarmError(f"the gradient's norm is {norm}", self.state.loss_so_far)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.state.loss_scale, self.state.steps_at_loss_scale = scaler_state(self.scaler)
        if self.state.loss_scale is not None and self.state.loss_scale < 1:
            raise RunError(
                f"training.compute_dtype: fp16 cannot hold the numbers of step "
                f"{self.state.step + 1}, even with its loss unscaled; start a new run with fp32, "
                "or with bf16 where the device is fast in it"
            )
        return norm

    def _clip(self, limit: float | None) -> float:
        """The norm of the gradient of all ranks, which is scaled to `limit` where it is larger."""
        if not self.ranks.alone:
            return self.ranks.clip(self.parameters, limit)
        most = math.inf if limit is None else limit
        return nn.utils.clip_grad_norm_(self.parameters.values(), most).item()

    # --- harm -----------------------------------------------------------------------------------

    def _leave_out(self, harm: HarmError) -> None:
        """Forget the step's gradient, and name the documents that do harm."""
        self.optimizer.zero_grad(set_to_none=True)
        self.weights_harmed = harm.weights_changed
        guard = self.state.guard
        guard.skipped_in_a_row += 1
        guard.records += 1
        documents = [d for pack in self.loader.documents_of(self.state.step) for d in pack]
        found = documents if harm.weights_changed else culprits(documents, self._harms)
        self.announce(StepLeftOut(self.state.step + 1, str(harm), found))

    def _harms(self, document: Any) -> bool:
        """Whether a document by itself has a loss or a gradient that may not be. Draws no random
        number that the run would have drawn."""
        random = random_state()
        try:
            total, count = self.objective(self._pack([document]))
            mean = total / count  # the same on all ranks, which try the same document
            highest = self.state.guard.highest_loss(self.settings.guard)
            if not math.isfinite(mean.item()) or mean.item() > highest:
                return True
            if self.in_backward is not None:  # it would update the weights
                return False
            mean.backward()
            self.ranks.sum_gradients(self.parameters)
            return not math.isfinite(self._clip(None))
        finally:
            self.optimizer.zero_grad(set_to_none=True)
            restore_random_state(random)
