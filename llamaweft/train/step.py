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
from llamaweft.runtime import anon_bytes, device_bytes, rss_bytes
from llamaweft.train.checkpoint import LoopState, random_state, restore_random_state
from llamaweft.train.events import Announcer, PacksSplit, StepEnded, StepLeftOut, StopRequest
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


class LoaderLike(Protocol):
    total_steps: int

    def steps(self, start_step: int = 0) -> Iterator[list[Any]]: ...

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


@dataclass(kw_only=True)
class Stepper:
    """objective: a pack -> (weighted sum of losses, sum of weights).
    useful_flops: base matmul FLOPs that a list of packs needs.
    scaler: of fp16's gradients; a disabled one changes nothing.
    in_backward: steps the optimizer while gradients are computed; None: after that.
    away_seconds: how long others had the device between two turns; no time of this run.
    weights_harmed: whether a step that did harm was taken in part.
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
    random_at_start: dict[str, Tensor] = field(default_factory=dict)
    _bears_over_budget: bool = False

    def _clock(self) -> float:
        """Seconds, without those that others had the device."""
        return time.perf_counter() - self.away_seconds

    def _turn(self) -> Iterator[None]:
        """Let others have the device, if there are any."""
        left = time.perf_counter()
        yield
        self.away_seconds += time.perf_counter() - left

    def _step(self, packs: list[PackLike], began: float) -> Iterator[None]:
        """Take the step, or leave it out; or, where a stop is asked for, end after a pack, with
        `state.packs_done` above 0."""
        rate = self.learning_rate(self.state.step + 1) * self.state.guard.learning_rate_factor
        set_learning_rate(self.optimizer, rate)
        harm = None
        try:
            yield from self._accumulate_within_memory(packs)
            if self.state.packs_done < len(packs):
                return
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
                skipped=harm is not None,
            )
        )

    # --- the gradient ---------------------------------------------------------------------------

    def _accumulate_within_memory(self, packs: list[PackLike]) -> Iterator[None]:
        """Accumulate, and where memory runs out start the step again with smaller packs."""
        if not self.state.packs_done:  # else it is a step that goes on after a stop
            self.random_at_start = random_state()
        while True:
            try:
                yield from self._accumulate(packs)
                return
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
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

    def _accumulate(self, packs: list[PackLike]) -> Iterator[None]:
        """Add up the gradients of the packs that are not done yet, and the loss.

        Raises HarmError before a backward pass from a loss that is none, or too high.
        """
        count = torch.stack([pack.label_weight_N.sum() for pack in packs]).sum()
        for index in range(self.state.packs_done, len(packs)):
            for part in self._parts(packs[index], index):
                total, _ = self.objective(part)
                mean = total / count
                self._check_budget()
                loss = self.state.loss_so_far + mean.item()
                self._check_loss(loss)
                self.scaler.scale(mean).backward()
                self.state.loss_so_far = loss
            self.state.packs_done = index + 1
            if self.stop.reason is not None and self.state.packs_done < len(packs):
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
        if tokens is None or pack.tokens <= tokens:
            return [pack]
        documents = self.loader.documents_of(self.state.step)[index]
        return [self._pack(part) for part in split(documents, tokens)]

    def _pack(self, documents: list[Any]) -> PackLike:
        pack: PackLike = self.loader.collate(documents)
        return pack.to(self.device)

    def _check_budget(self) -> None:
        """Raises OverBudgetError where the process holds far more than the recipe allows. Between
        the forward and the backward pass all that is kept is there."""
        budget = self.settings.memory_budget
        if budget is None or self._bears_over_budget or self.in_backward is not None:
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
        documents = self.loader.documents_of(self.state.step)[self.state.packs_done]
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
        self.scaler.unscale_(self.optimizer)
        limit = self.settings.max_grad_norm
        clipped = nn.utils.clip_grad_norm_(
            self.parameters.values(), float("inf") if limit is None else limit
        )
        norm = clipped.item()
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
            mean = total / count
            highest = self.state.guard.highest_loss(self.settings.guard)
            if not math.isfinite(mean.item()) or mean.item() > highest:
                return True
            if self.in_backward is not None:  # it would update the weights
                return False
            mean.backward()
            gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
            return not all(bool(gradient.isfinite().all()) for gradient in gradients)
        finally:
            self.optimizer.zero_grad(set_to_none=True)
            restore_random_state(random)
