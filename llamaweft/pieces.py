"""The pieces that a recipe names, each built when it is first asked for."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamaweft.adapters.folder import CONFIG, check_same_adapter, load_adapter_state, read_adapter
from llamaweft.adapters.lora import LAYER_LINEARS, LoraConfig, inject
from llamaweft.data.chat import Document, special_ids
from llamaweft.data.loader import Loader
from llamaweft.data.prepare import Preparation, Prepared
from llamaweft.data.targets import HEAD_TASKS
from llamaweft.errors import UserError
from llamaweft.model.folder import base_name, find_folder, read_config
from llamaweft.model.llama import LlamaForCausalLM, LlamaWithHead, Memory, Model, with_head
from llamaweft.model.load import load_causal_lm
from llamaweft.model.pack import Pack
from llamaweft.model.presets import LlamaConfig, parameter_count
from llamaweft.model.stores import cached_store, open_store, own_codec, store_bytes
from llamaweft.model.task_heads import HeadConfig, TaskHead
from llamaweft.model.tokenizer import load_tokenizer, set_chat_template
from llamaweft.model.untrained import untrained_tokens
from llamaweft.plan.hardware import available_bytes
from llamaweft.plan.memory import Schedule, Workload, solve, trained_parameter_count
from llamaweft.recipe import Recipe
from llamaweft.runtime import Runtime, anon_bytes, choose_runtime, return_freed_memory
from llamaweft.train.optim import optimizer_bytes_per_parameter

RUNTIME_BYTES = 64 * 2**20
"""What the process takes beyond what it has when the plan is made: compiled kernels, buffers of the
matrix library."""

LARGE_TENSOR_BYTES = 8 * 2**20
"""Widest activation from which on freed memory is given back at once."""

FRAGMENT_BYTES = 96 * 2**20
"""What the C library holds on to otherwise. docs/plan.md has what was measured."""

ENDS = ("begins", "ends")
"""What the two targets of an answer are called."""

LEAST_CACHE_BYTES = 32 * 2**20
"""Keys and values of answers take so much, whatever the budget says."""


class Pieces:
    """A recipe and the pieces it names, each built when it is first asked for."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.on_rows: Callable[[int], None] = lambda rows: None
        self.say: Callable[[str], None] = lambda what: None
        """Told how many rows are prepared, and what takes long."""

    @cached_property
    def runtime(self) -> Runtime:
        return choose_runtime(self.recipe.training.device, self.recipe.training.compute_dtype)

    @cached_property
    def model_folder(self) -> Path:
        return find_folder(self.recipe.model)

    @cached_property
    def config(self) -> LlamaConfig:
        return read_config(self.model_folder)

    @cached_property
    def tokenizer(self) -> Any:
        tokenizer = load_tokenizer(self.model_folder)
        if self.recipe.data.chat_template is not None:
            set_chat_template(tokenizer, self.recipe.data.chat_template)
        return tokenizer

    @property
    def lora(self) -> LoraConfig | None:
        """The adapter, or None for full fine-tuning."""
        adapter = self.recipe.adapter
        if adapter.method == "none":
            return None
        targets = (
            LAYER_LINEARS if adapter.target_modules == "all-linear" else adapter.target_modules
        )
        return LoraConfig(
            adapter.r,
            adapter.lora_alpha,
            adapter.lora_dropout,
            adapter.use_rslora,
            tuple(targets),
            use_dora=adapter.method == "dora",
        )

    @cached_property
    def initial(self) -> tuple[Path, dict[str, Tensor]] | None:
        """The adapter that training goes on from and its tensors; None for a fresh one.

        Raises UserError when it cannot be read, or is of another kind, shape or base.
        """
        if self.recipe.adapter.init_from is None:
            return None
        assert self.lora is not None
        folder = Path(self.recipe.adapter.init_from)
        config, base, state = read_adapter(folder)
        check_same_adapter(self.lora, config, folder)
        ours = base_name(self.recipe.model, self.model_folder)
        if base != ours:
            raise UserError(
                f"adapter.init_from: {folder} was trained on {base}, and model is {ours}; set "
                f"model: {base}, or where they are the same, say so in {folder / CONFIG}"
            )
        return folder, state

    @cached_property
    def head(self) -> HeadConfig | None:
        """The head of the task; None for tasks that predict the next token."""
        task = self.recipe.task
        if task not in HEAD_TASKS:
            return None
        classes = self.data.classes
        return HeadConfig(
            task,
            labels=() if classes is None else tuple(classes.names),
            many=classes is not None and classes.many,
            label_smoothing=self.recipe.training.label_smoothing,
        )

    def label_names(self, document: Document) -> list[str]:
        """What a head should say of a document, as a person reads it."""
        assert document.labels is not None
        targets, classes = document.labels["target"].tolist(), self.data.classes
        if self.recipe.task == "question_answering":
            return [ENDS[int(target)] for target in targets]
        if classes is None:
            return [f"{target:g}" for target in targets]
        return [classes.names[int(t)] if t >= 0 else "no class" for t in targets]

    @property
    def base_weights(self) -> str:
        """The codec that frozen weights are held in; full fine-tuning holds all in fp32."""
        return self._base_weights[0]

    @cached_property
    def _base_weights(self) -> tuple[str, str]:
        """The codec, and the reason for it."""
        if self.lora is None:
            return "fp32", "every weight is trained"
        chosen = self.recipe.base_weights
        if chosen != "auto":
            return chosen, "asked for by the recipe"
        if own := own_codec(self.model_folder):
            return own, "what the model folder holds"
        computed = "fp32" if self.runtime.compute_dtype_name == "fp32" else "bf16"
        if store_bytes(self.config, computed) <= self.free_bytes / 2:
            return computed, "they fit as they are computed with"
        return "nf4", f"in {computed} they would take more than half of what is free"

    @cached_property
    def preparation(self) -> Preparation:
        data = self.recipe.data
        return Preparation(
            tokenizer=self.tokenizer,
            task=self.recipe.task,
            train_on=data.train_on,
            max_length_tokens=data.max_length_tokens,
            on_too_long=data.on_too_long,
            seed=self.recipe.training.seed,
            on_bad_row=data.on_bad_row,
            clean=[step.model_dump() for step in data.clean],
            allow=self.recipe.audit.allow,
            vocab_size=self.config.vocab_size,
            untrained=self.untrained_tokens,
            class_weights=self.recipe.head.class_weights,
            report=self.on_rows,
            say=self.say,
        )

    @cached_property
    def untrained_tokens(self) -> list[int]:
        """Control tokens that the model never learnt, as base models have them."""
        return untrained_tokens(self.model_folder, special_ids(self.tokenizer))

    @cached_property
    def data(self) -> Prepared:
        train = [(rows, rows.weight) for rows in self.recipe.data.train]
        held = self.recipe.data.validation
        fraction = held.fraction if held else None
        return self.preparation.prepare(train, None if fraction else held, fraction)

    @cached_property
    def loader(self) -> Loader[Pack]:
        training = self.recipe.training
        return Loader(
            self.data.documents,
            partial(Pack.from_documents, share=self.shares_prefixes),
            micro_batch_tokens=training.micro_batch_tokens,
            accumulation=training.gradient_accumulation_steps,
            epochs=training.num_train_epochs,
            max_steps=training.max_steps,
            weights=self.data.weights,
            seed=training.seed,
            share=self.shares_prefixes,
        )

    @property
    def shares_prefixes(self) -> bool:
        """Whether documents that begin alike share that."""
        return self._unshared_because is None

    @property
    def _unshared_because(self) -> str | None:
        """Why each document is computed by itself, where it must be."""
        if self.recipe.task == "question_answering":
            return "the head reads all of it"
        if self.recipe.training.neftune_noise_alpha is not None:
            return "training.neftune_noise_alpha adds other noise to each"
        if self.lora is not None and self.lora.lora_dropout > 0:
            return "adapter.lora_dropout drops others in each"
        return None

    @cached_property
    def schedule(self) -> Schedule:
        return solve(self.workload, self.budget_bytes)

    @property
    def budget_bytes(self) -> int:
        """Memory that the run may take."""
        return self.recipe.training.memory_budget or self.free_bytes

    def cache_bytes(self) -> int:
        """What keys and values of answers may take now: half of what the budget leaves beside what
        the process holds, or a quarter of what is free."""
        budget = self.recipe.training.memory_budget
        if budget is None or self.runtime.device.type != "cpu":
            return available_bytes(self.runtime.device) // 4
        return max(LEAST_CACHE_BYTES, (budget - anon_bytes()) // 2)

    @cached_property
    def free_bytes(self) -> int:
        return available_bytes(self.runtime.device)

    @cached_property
    def workload(self) -> Workload:
        training, (tokens, labels) = self.recipe.training, self.loader.largest_pack
        on_cpu = self.runtime.device.type == "cpu"
        held = 0 if on_cpu or self.lora is None else store_bytes(self.config, self.base_weights)
        compute_bytes = self.runtime.compute_dtype.itemsize
        fragments = FRAGMENT_BYTES if on_cpu and not self._has_large_tensors else 0
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
            runtime_bytes=RUNTIME_BYTES + (anon_bytes() if on_cpu else 0),
            fragment_bytes=fragments,
            weight_bytes=held,
            optimizer_bytes=optimizer_bytes_per_parameter(training.optimizer),
            keeps_attention=on_cpu,
            accumulates=training.gradient_accumulation_steps > 1,
            magnitudes=self.lora is not None and self.lora.use_dora,
            head_outputs=None if self.head is None else self.head.outputs,
        )

    @property
    def _has_large_tensors(self) -> bool:
        """Whether the widest activation is large enough to be worth memory of its own."""
        numbers = self.loader.largest_pack[0] * self.config.intermediate_size
        return numbers * self.runtime.compute_dtype.itemsize >= LARGE_TENSOR_BYTES

    def load_model(self) -> Model:
        """The base model with a fresh adapter, or that of adapter.init_from, on its device."""
        if self.runtime.device.type == "cpu" and self._has_large_tensors:
            return_freed_memory()  # else the peak would exceed the budget
        model = self.adapted(self._load(self.model_folder, frozen=self.lora is not None))
        model.model.neftune_noise_alpha = self.recipe.training.neftune_noise_alpha
        if isinstance(model, LlamaForCausalLM):
            model.lm_head.label_smoothing = self.recipe.training.label_smoothing
        if self.initial is not None:
            load_adapter_state(model, self.initial[1], str(self.initial[0]))
        model.model.memory = Memory(
            [frozenset(names) for names in self.schedule.keep],
            self.schedule.mlp_tile_tokens,
            self.schedule.loss_tile_labels,
            torch.bfloat16 if self.recipe.training.keep_activations == "bf16" else None,
        )
        return model

    def adapted(self, causal: LlamaForCausalLM) -> Model:
        """A base model with the head of the task, if it has one, and a fresh adapter."""
        model: Model = causal
        if self.head is not None:
            head = TaskHead(self.head, causal.config.hidden_size, causal.device)
            model = with_head(causal, head)
        if self.lora is not None:
            inject(model, self.lora)
            if isinstance(model, LlamaWithHead):
                model.head.requires_grad_(True)
        return model

    def load_frozen(self, folder: Path | None = None) -> LlamaForCausalLM:
        """A model without adapter that is only used: the base, or that of another folder."""
        return self._load(folder or self.model_folder, frozen=True).eval()

    def _load(self, folder: Path, *, frozen: bool) -> LlamaForCausalLM:
        return load_causal_lm(
            folder,
            base_weights=self.base_weights if frozen else None,
            compute_dtype=self.runtime.compute_dtype,
            device=self.runtime.device,
        )

    def prepare_weights(self, say: Callable[[str], None]) -> None:
        """Make the store of the frozen weights, where there is none yet."""
        if self.lora is None:
            return
        folder, codec = self.model_folder, self.base_weights
        if own_codec(folder) is None and not cached_store(folder, codec).exists():
            say(f"converting the weights to {codec}, once")
        open_store(folder, codec)

    @property
    def device_name(self) -> str:
        threads = f"{self.runtime.threads} threads" if self.runtime.device.type == "cpu" else ""
        return f"{self.runtime.device} {threads}".strip()

    def changed(self, changes: dict[str, str]) -> Pieces:
        """The pieces of this recipe with some keys changed that the data does not depend on."""
        other = copy(self)
        other.recipe = self.recipe.overridden(changes)
        kept = ("data", "runtime", "model_folder", "config", "tokenizer", "free_bytes")
        always = ("recipe", "planned", "on_rows", "say")
        for name in [name for name in other.__dict__ if name not in (*always, *kept)]:
            del other.__dict__[name]
        return other

    def decisions(self) -> dict[str, str]:
        """What was chosen, and why: printed once at the start and saved."""
        runtime = self.runtime
        trained = trained_parameter_count(self.workload)
        method = "full fine-tuning"
        if self.lora:
            method = f"{'DoRA' if self.lora.use_dora else 'LoRA'} r {self.lora.r}"
        share = self.schedule.recomputed_share
        given, computed, _ = self.loader.epoch_tokens
        recompute = (
            "nothing is recomputed: the activations fit the budget"
            if share == 0
            else f"{share:.0%} of the forward pass's products are done again to fit the budget"
        )
        return {
            "model": f"{self.recipe.model}, {parameter_count(self.config) / 1e6:.1f}M parameters",
            "device": self.device_name,
            "compute": f"{runtime.compute_dtype_name}: {runtime.reason}",
            "weights": f"frozen weights held in {self.base_weights}: {self._base_weights[1]}"
            if self.lora
            else "every weight is trained in fp32",
            "trained": f"{method}, {trained / 1e6:.2f}M parameters",
            "recompute": recompute,
            "prefixes": f"{given - computed:,} of {given:,} tokens an epoch are spared, "
            f"{1 - computed / given:.0%}: what documents of a pack begin with in common"
            if self.shares_prefixes
            else f"computed for each document: {self._unshared_because}",
        }
