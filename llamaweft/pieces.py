"""The pieces that a recipe names, each built when it is first asked for."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamaweft.adapters.folder import CONFIG, check_same_adapter, load_adapter_state, read_adapter
from llamaweft.adapters.lora import LAYER_LINEARS, LoraConfig, inject, start_pissa
from llamaweft.adapters.pissa import check_codec, principal_bytes
from llamaweft.adapters.token_rows import read_token_indices
from llamaweft.adapters.whole import (
    HEAD,
    WholeConfig,
    check_trained_once,
    check_whole,
    train_whole,
    weighted_modules,
)
from llamaweft.data.chat import special_ids
from llamaweft.data.general import General, general_prompts, read_general
from llamaweft.data.loader import Loader
from llamaweft.data.prepare import Preparation, Prepared
from llamaweft.data.targets import HEAD_TASKS
from llamaweft.errors import UserError
from llamaweft.model.folder import base_name, find_folder, read_config
from llamaweft.model.llama import (
    LlamaForCausalLM,
    LlamaWithHead,
    Memory,
    Model,
    empty_causal_lm,
    with_head,
)
from llamaweft.model.load import load_causal_lm, same_weights
from llamaweft.model.new_tokens import NewTokens, add_new_tokens, grow, named
from llamaweft.model.pack import Pack
from llamaweft.model.presets import LlamaConfig, parameter_count
from llamaweft.model.stores import cached_store, open_store, own_codec, store_bytes
from llamaweft.model.task_heads import HeadConfig, TaskHead
from llamaweft.model.tokenizer import load_tokenizer, set_chat_template
from llamaweft.model.untrained import untrained_tokens
from llamaweft.plan.hardware import available_bytes
from llamaweft.plan.memory import Schedule, Workload, solve, trained_parameter_count
from llamaweft.plan.shapes import LINEARS, sizes
from llamaweft.plan.whole import Whole, whole_of
from llamaweft.recipe import Recipe
from llamaweft.runtime import Runtime, anon_bytes, choose_runtime, return_freed_memory
from llamaweft.train.optim import optimizer_bytes_per_parameter
from llamaweft.weights.grown import row_parameters

RUNTIME_BYTES = 64 * 2**20
"""What the process takes beyond what it has when the plan is made: compiled kernels, buffers of the
matrix library."""

LARGE_TENSOR_BYTES = 8 * 2**20
"""Widest activation from which on freed memory is given back at once."""

FRAGMENT_BYTES = 96 * 2**20
"""What the C library holds on to otherwise. docs/plan.md has what was measured."""

LEAST_CACHE_BYTES = 32 * 2**20
"""Keys and values of answers take so much, whatever the budget says."""


class Pieces:
    """A recipe and the pieces it names, each built when it is first asked for."""

    base: LlamaForCausalLM | None = None
    """The frozen base, where it is in memory already and may be shared."""

    beside_bytes = 0
    """What other runs hold beside this one's."""

    resumes = False
    """Whether a checkpoint holds where the adapter started, so that it is not computed."""

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
        """Of the model with rows for new tokens."""
        config = read_config(self.model_folder)
        return config if self.new_tokens is None else self.new_tokens.grown(config)

    @property
    def tokenizer(self) -> Any:
        return self._vocabulary[0]

    @property
    def new_tokens(self) -> NewTokens | None:
        """What the recipe adds to the model's tokenizer; None for nothing."""
        return self._vocabulary[1] if self.recipe.data.new_tokens else None

    @cached_property
    def _vocabulary(self) -> tuple[Any, NewTokens | None]:
        """The tokenizer, and what was added to it."""
        tokenizer, new = load_tokenizer(self.model_folder), None
        wanted = [(token.token, token.special) for token in self.recipe.data.new_tokens]
        if wanted:
            new = add_new_tokens(tokenizer, wanted, read_config(self.model_folder).vocab_size)
        if self.recipe.data.chat_template is not None:
            set_chat_template(tokenizer, self.recipe.data.chat_template)
        return tokenizer, new

    @property
    def lora(self) -> LoraConfig | None:
        """The adapter, or None where weights themselves are trained."""
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
            init_lora_weights=adapter.init_lora_weights,
        )

    @property
    def trains_all(self) -> bool:
        """Whether every weight is trained, so that nothing is held in a codec."""
        return self.recipe.adapter.trains_all

    @cached_property
    def whole(self) -> tuple[str, ...]:
        """Modules that are trained whole beside what is frozen, by their names in the causal
        model; a head of the task's own is always trained and not among them.

        Raises UserError for modules that there are not, and for what two keys would train.
        """
        names = weighted_modules(empty_causal_lm(self.config))
        own_head = []
        if self.recipe.task in HEAD_TASKS:
            names.remove(HEAD)
            own_head = [HeadConfig(self.recipe.task, labels=()).name]
        tied = self.config.tie_word_embeddings
        found = self._whole.among([*names, *own_head], self.config.num_hidden_layers, tied)
        if not self.trains_all:
            targets = None if self.lora is None else self.lora.target_modules
            check_trained_once(found, names, targets, self.new_tokens is not None)
        return tuple(name for name in found if name not in own_head)

    @property
    def _whole(self) -> WholeConfig:
        adapter = self.recipe.adapter
        return WholeConfig(adapter.top_layers or 0, tuple(adapter.modules_to_save or ()))

    def check_whole(self, adapter: LoraConfig, where: str) -> None:
        """Raises UserError where the base model cannot hold what an adapter folder holds whole."""
        names = weighted_modules(empty_causal_lm(self.config))
        check_whole(adapter.modules_to_save, names, self.config.tie_word_embeddings, where)

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
        self.check_whole(config, f"adapter.init_from: the adapter {folder}")
        check_same_adapter(replace(self.lora, modules_to_save=self.whole), config, folder)
        self._check_same_tokens(folder)
        ours = base_name(self.recipe.model, self.model_folder)
        if base != ours:
            raise UserError(
                f"adapter.init_from: {folder} was trained on {base}, and model is {ours}; set "
                f"model: {base}, or where they are the same, say so in {folder / CONFIG}"
            )
        return folder, state

    def _check_same_tokens(self, folder: Path) -> None:
        theirs = adapter_tokens(folder)
        ours = [(new.token, new.special) for new in self.recipe.data.new_tokens]
        if ours != theirs:
            tokens, wanted = (", ".join(t for t, _ in of) or "none" for of in (theirs, ours))
            raise UserError(
                f"adapter.init_from: the adapter {folder} was trained with new tokens: {tokens}, "
                f"and the recipe has {wanted}; set data.new_tokens to the same, in the same order"
            )

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
            center_rewards_coefficient=self.recipe.head.center_rewards_coefficient or 0.0,
        )

    @property
    def base_weights(self) -> str:
        """The codec that frozen weights are held in; full fine-tuning holds all in fp32."""
        return self._base_weights[0]

    def check_start(self) -> None:
        """Raises UserError where the adapter cannot start from weights as they would be held."""
        if self.lora is not None and self.lora.is_pissa:
            check_codec(self.lora.init_lora_weights, *self._base_weights)

    @cached_property
    def _base_weights(self) -> tuple[str, str]:
        """The codec, and the reason for it."""
        if self.trains_all:
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
        new = () if self.new_tokens is None else self.new_tokens.ids
        return untrained_tokens(self.model_folder, special_ids(self.tokenizer) - {*new})

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
            runtime_bytes=RUNTIME_BYTES + self.beside_bytes + (anon_bytes() if on_cpu else 0),
            fragment_bytes=fragments,
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

    @cached_property
    def general(self) -> General | None:
        """The general prompts that forgetting is measured on; None where it is not."""
        if self.recipe.forgetting is None:
            return None
        new = () if self.new_tokens is None else self.new_tokens.ids
        return read_general(general_prompts(self.recipe.forgetting.prompts), self.tokenizer, new)

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

    def load_model(self) -> Model:
        """The base model with a fresh adapter, or that of adapter.init_from, on its device."""
        if self.runtime.device.type == "cpu" and self._has_large_tensors:
            return_freed_memory()  # else the peak would exceed the budget
        model = self.adapted(self.load_to_train())
        model.model.neftune_noise_alpha = self.recipe.training.neftune_noise_alpha
        if isinstance(model, LlamaForCausalLM):
            model.lm_head.label_smoothing = self.recipe.training.label_smoothing
        if self.initial is not None:
            load_adapter_state(model, self.initial[1], str(self.initial[0]))
        elif self.lora is not None and self.lora.is_pissa and not self.resumes:
            start_pissa(model, self.lora, self.say)
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
        whole = [causal.get_submodule(name) for name in self.whole]
        if self.head is not None:
            head = TaskHead(self.head, causal.config.hidden_size, causal.device)
            model = with_head(causal, head)
        if self.lora is not None:
            inject(model, self.lora)
            if isinstance(model, LlamaWithHead):
                model.head.requires_grad_(True)
            for rows in row_parameters(model).values():
                rows.requires_grad_(True)
        train_whole(model, whole)
        return model

    def load_to_train(self) -> LlamaForCausalLM:
        """The base model, with what is trained of its own weights as parameters."""
        return self._load(self.model_folder, frozen=not self.trains_all, trained=self.whole)

    def load_frozen(
        self, folder: Path | None = None, trained: tuple[str, ...] = ()
    ) -> LlamaForCausalLM:
        """A model without adapter that is only used: the base, or that of another folder. trained:
        modules that are held as parameters, to be filled."""
        return self._load(folder or self.model_folder, frozen=True, trained=trained).eval()

    def load_base(self) -> LlamaForCausalLM:
        """The frozen base, for the pieces of several recipes to share."""
        return self._load(self.model_folder, frozen=True)

    def _load(
        self, folder: Path, *, frozen: bool, trained: tuple[str, ...] = ()
    ) -> LlamaForCausalLM:
        may_share = frozen and not trained
        if may_share and self.base is not None and folder == self.model_folder:
            return same_weights(self.base)
        model = load_causal_lm(
            folder,
            base_weights=self.base_weights if frozen else None,
            compute_dtype=self.runtime.compute_dtype,
            device=self.runtime.device,
            trained=trained,
        )
        if self.new_tokens is not None and folder == self.model_folder:  # a run's own has the rows
            grow(model, self.new_tokens)
        return model

    def prepare_weights(self, say: Callable[[str], None]) -> None:
        """Make the store of the frozen weights, where there is none yet."""
        if self.trains_all:
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
        kept = ("data", "runtime", "model_folder", "config", "_vocabulary", "free_bytes")
        always = ("recipe", "planned", "on_rows", "say")
        for name in [name for name in other.__dict__ if name not in (*always, *kept)]:
            del other.__dict__[name]
        return other

    def take_from(self, other: Pieces, *, rows: bool) -> None:
        """Use what the pieces of a recipe with the same model have built. rows: its data too."""
        if other is self:
            return
        kept = ("runtime", "model_folder", "config", "_vocabulary", "untrained_tokens")
        for name in (*kept, "free_bytes", *(["data"] if rows else [])):
            self.__dict__[name] = getattr(other, name)

    @property
    def starts_as_base(self) -> bool:
        """Whether the untouched model is the base itself, number for number."""
        adapter = self.recipe.adapter
        fresh = adapter.init_from is None and adapter.modules_to_save is None
        return self.head is None and adapter.method == "lora" and fresh

    def decisions(self) -> dict[str, str]:
        """What was chosen, and why: printed once at the start and saved."""
        runtime = self.runtime
        trained = trained_parameter_count(self.workload)
        whole = self._whole.said(self.config.num_hidden_layers)
        method = "full fine-tuning" if self.trains_all else f"{whole} alone"
        if self.lora:
            method = f"{'DoRA' if self.lora.use_dora else 'LoRA'} r {self.lora.r}"
            if self.lora.is_pissa:
                method += f" from the principal part of the weights ({self.lora.init_lora_weights})"
        if self.lora and self.whole:
            method += f" with {whole} whole"
        if self.lora and self.new_tokens is not None:
            method += f" with rows of {len(self.new_tokens.ids)} new tokens"
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
            "weights": "every weight is trained in fp32"
            if self.trains_all
            else f"frozen weights held in {self.base_weights}: {self._base_weights[1]}",
            "trained": f"{method}, {trained / 1e6:.2f}M parameters"
            + ", each updated in the backward pass" * self.recipe.training.optimizer_in_backward,
            "recompute": recompute,
            "prefixes": f"{given - computed:,} of {given:,} tokens an epoch are spared, "
            f"{1 - computed / given:.0%}: what documents of a pack begin with in common"
            if self.shares_prefixes
            else f"computed for each document: {self._unshared_because}",
        }


def adapter_tokens(folder: Path) -> list[tuple[str, bool]]:
    """The new tokens whose rows an adapter folder holds, each with whether it is a control token:
    as `data.new_tokens` has them. Their names are in the tokenizer beside them.

    Raises UserError where that is missing or does not have them.
    """
    ids = read_token_indices(folder, CONFIG)
    return named(load_tokenizer(folder), ids) if ids else []
