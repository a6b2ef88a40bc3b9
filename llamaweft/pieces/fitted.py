"""How a run fits into memory: what decides its bytes, and the schedule of what is kept."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import torch

from llamaweft.adapters.pissa import principal_bytes
from llamaweft.adapters.whole import (
    HEAD,
)
from llamaweft.errors import UserError
from llamaweft.model.stores import store_bytes
from llamaweft.pieces.trained import Trained
from llamaweft.plan.hardware import available_bytes
from llamaweft.plan.memory import Schedule, Workload, solve
from llamaweft.plan.rank import of_rank
from llamaweft.plan.shapes import LINEARS, sizes
from llamaweft.plan.whole import Whole, whole_of
from llamaweft.runtime import anon_bytes
from llamaweft.train.optim import optimizer_bytes_per_parameter
from llamaweft.weights.matmul import kernel_bytes

RUNTIME_BYTES, WARM_RUNTIME_BYTES = 64 * 2**20, 24 * 2**20
"""What the process takes beyond what it has when the plan is made: compiled kernels, buffers of the
matrix library; and what remains of that once a layer was run."""

LARGE_TENSOR_BYTES = 8 * 2**20
"""Widest activation from which on freed memory is given back at once."""

FRAGMENT_BYTES = 128 * 2**20
"""What the C library holds on to, at most, of memory that it does not map tensor by tensor; part of
it was given back when the plan was made, and is taken again. docs/plan.md has what was measured."""

LEAST_CACHE_BYTES = 32 * 2**20
"""Keys and values of answers take so much, whatever the budget says."""


class Fitted(Trained):
    """The workload of a run and its schedule."""

    beside_bytes = 0
    """What other runs hold beside this one's."""

    has_run_a_layer = False
    """Whether kernels are compiled and buffers taken already."""

    @cached_property
    def schedule(self) -> Schedule:
        return solve(self.rank_workload, self.budget_bytes)

    @property
    def rank_workload(self) -> Workload:
        """What one rank has to do of it, where several share it."""
        if self.ranks.alone:
            return self.workload
        layout, on_cpu = self.ranks.layout, self.runtime.device.type == "cpu"
        return of_rank(
            self.workload,
            replace(layout, offload=False) if on_cpu else layout,  # the memory that is counted
            self.base_weights,
            mapped=on_cpu,
            packs=self.recipe.training.gradient_accumulation_steps,
        )

    @property
    def budget_bytes(self) -> int:
        """Memory that the run may take."""
        return self.recipe.training.memory_budget or self.free_bytes

    def cache_bytes(self) -> int:
        """What keys and values of answers may take now: half of what the budget leaves beside what
        the process holds, or a quarter of what is free."""
        budget = self.recipe.training.memory_budget
        if budget is None or self.runtime.device.type != "cpu":
            room = available_bytes(self.runtime.device) // 4
        else:
            room = max(LEAST_CACHE_BYTES, (budget - anon_bytes()) // 2)
        return min(self.ranks.gather(room))  # ranks answer together, in the same batches

    @cached_property
    def workload(self) -> Workload:
        training, (tokens, labels) = self.recipe.training, self.loader.largest_pack
        if training.optimizer_in_backward and self.runtime.compute_dtype == torch.float16:
            raise UserError(
                f"training.optimizer_in_backward: {self.runtime.device} computes in fp16 "
                f"({self.runtime.reason}), which skips a step when any of its gradients "
                "overflowed, and some weights would be updated by then; set "
                "training.compute_dtype: fp32"
            )
        on_cpu = self.runtime.device.type == "cpu"
        held = 0
        if not on_cpu and not self.trains_all:
            held = store_bytes(self.config, self.base_weights, without=self.whole)
        compute_bytes = self.runtime.compute_dtype.itemsize
        to_come = WARM_RUNTIME_BYTES if on_cpu and self.has_run_a_layer else RUNTIME_BYTES
        if on_cpu:
            to_come += anon_bytes() + kernel_bytes(self.runtime.compute_dtype, tokens)
        return Workload(
            config=self.config,
            pack_tokens=tokens,
            labels=labels,
            rank=self.lora.r if self.lora else None,
            targets=tuple(t.rpartition(".")[2] for t in self.lora.target_modules)
            if self.lora
            else (),
            compute_bytes=compute_bytes,
            kept_bytes=2 if training.keep_activations == "bf16" else None,
            runtime_bytes=to_come + self.beside_bytes,
            fragment_bytes=FRAGMENT_BYTES if on_cpu else 0,
            large_tensors=on_cpu and self._has_large_tensors,
            weight_bytes=held,
            optimizer_bytes=optimizer_bytes_per_parameter(training.optimizer),
            keeps_attention=on_cpu,
            accumulates=training.gradient_accumulation_steps > 1,
            magnitudes=self.lora is not None and self.lora.use_dora,
            keeps_start=self.lora is not None and self.lora.is_pissa,
            start_bytes=self._start_bytes,
            head_outputs=None if self.head is None else self.head.outputs,
            forgetting_bytes=self._forgetting_bytes,
            whole=self._whole_shapes,
            in_backward=training.optimizer_in_backward,
            new_token_numbers=self._new_token_numbers,
        )

    @property
    def _forgetting_bytes(self) -> int:
        """Of the hidden states that are kept of the model as the run began, and of a copy of its
        head in fp32 where that is trained."""
        if self.general is None:
            return 0
        head = self.config.vocab_size if self.trains_all or HEAD in self.whole else 0
        numbers_bytes = self.general.labels * self.runtime.compute_dtype.itemsize + 4 * head
        return self.config.hidden_size * numbers_bytes

    @property
    def _new_token_numbers(self) -> int:
        """In the rows of new tokens that are trained beside an adapter: the embedding's, and those
        of a head of its own that predicts tokens."""
        if self.new_tokens is None or self.lora is None:
            return 0
        matrices = 1 if self.head is not None or self.config.tie_word_embeddings else 2
        return matrices * len(self.new_tokens.ids) * self.config.hidden_size

    @property
    def _start_bytes(self) -> int:
        """What taking the singular values of the largest adapted matrix needs."""
        if self.lora is None or not self.lora.is_pissa:
            return 0
        size, init = sizes(self.config), self.lora.init_lora_weights
        names = {target.rpartition(".")[2] for target in self.lora.target_modules}
        shapes = [LINEARS[name] for name in names & LINEARS.keys()]
        return max((principal_bytes(size[out], size[of], init) for of, out in shapes), default=0)

    @property
    def _whole_shapes(self) -> Whole | None:
        """What the plan needs to know of what is trained whole; None where that is nothing, or
        everything."""
        if self.trains_all or (self.lora is not None and not self.whole):
            return None
        return whole_of(self.config, self.whole, adapted=self.lora is not None)

    @property
    def _has_large_tensors(self) -> bool:
        """Whether the widest activation is large enough to be worth memory of its own."""
        numbers = self.loader.largest_pack[0] * self.config.intermediate_size
        return numbers * self.runtime.compute_dtype.itemsize >= LARGE_TENSOR_BYTES
