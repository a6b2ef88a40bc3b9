"""The pieces that a recipe names, each built when it is first asked for, up to the model."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import replace
from pathlib import Path

import torch

from llamaweft.adapters.folder import load_adapter_state
from llamaweft.adapters.lora import inject, start_pissa
from llamaweft.adapters.whole import (
    train_whole,
)
from llamaweft.model.llama import (
    LlamaForCausalLM,
    LlamaWithHead,
    Memory,
    Model,
    with_head,
)
from llamaweft.model.load import load_causal_lm, same_weights
from llamaweft.model.new_tokens import grow
from llamaweft.model.presets import parameter_count
from llamaweft.model.stores import cached_store, open_store, own_codec
from llamaweft.model.task_heads import TaskHead
from llamaweft.parallel.spread import spread
from llamaweft.pieces.fitted import Fitted
from llamaweft.plan.memory import trained_parameter_count
from llamaweft.runtime import keep_freed_memory, return_freed_memory, trim_freed_memory
from llamaweft.weights.grown import row_parameters


class Pieces(Fitted):
    """A recipe and the pieces it names, each built when it is first asked for."""

    base: LlamaForCausalLM | None = None
    """The frozen base, where it is in memory already and may be shared."""

    resumes = False
    """Whether a checkpoint holds where the adapter started, so that it is not computed."""

    def prepare_weights(self, say: Callable[[str], None]) -> None:
        """Make the store of the frozen weights, where there is none yet."""
        if self.trains_all:
            return
        folder, codec = self.model_folder, self.base_weights
        if own_codec(folder) is None and not cached_store(folder, codec).exists():
            say(f"converting the weights to {codec}, once")
        open_store(folder, codec)

    def settle_memory(self) -> None:
        """Tell the C library what to do with tensors that are freed: to keep large ones, if the
        budget has room for the fragments; else to give them back, and small ones too where memory
        is short."""
        if self.schedule.keeps_freed:
            keep_freed_memory()
            return
        on_cpu = self.runtime.device.type == "cpu"
        if self.workload.large_tensors or (on_cpu and self.schedule.returns_freed):
            return_freed_memory()

    @property
    def runs_a_layer(self) -> bool:
        """Whether running one layer tells how long all of them take: not where layers differ."""
        return not self.whole

    def ran_a_layer(self) -> None:
        """Measure anew what the process holds, which has kernels and buffers now."""
        trim_freed_memory()
        self.has_run_a_layer = True
        del self.workload
        if not self.resumes:  # a resumed run has the schedule of its checkpoint
            del self.schedule

    def adapt_to_measure(self, model: LlamaForCausalLM) -> None:
        """Put the adapter into a model that is only run for its time. PiSSA's start, as wide as A
        and B, is multiplied too."""
        if self.lora is not None:
            r = self.lora.r * (2 if self.lora.is_pissa else 1)
            inject(model, replace(self.lora, r=r, init_lora_weights="default"))

    def load_model(self) -> Model:
        """The base model with a fresh adapter, or that of adapter.init_from, on its device."""
        self.settle_memory()
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
        spread(model, self.ranks)
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
        frozen = not self.trains_all
        return self._load(
            self.model_folder, frozen=frozen, trained=self.whole, in_parts=self._loads_in_parts
        )

    @property
    def _loads_in_parts(self) -> bool:
        """Whether no rank holds all matrices while they are spread: not where an adapter or new
        tokens start from whole ones."""
        layout, lora = self.ranks.layout, self.lora
        starts_from_them = lora is not None and (lora.use_dora or lora.is_pissa)
        is_spread = layout.shard > 1 or layout.tensor > 1
        return is_spread and not starts_from_them and self.new_tokens is None

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
        self,
        folder: Path,
        *,
        frozen: bool,
        trained: tuple[str, ...] = (),
        in_parts: bool = False,
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
            in_parts=in_parts,
        )
        if self.new_tokens is not None and folder == self.model_folder:  # a run's own has the rows
            grow(model, self.new_tokens)
        return model

    def changed(self, changes: dict[str, str]) -> Pieces:
        """The pieces of this recipe with some keys changed that the data does not depend on."""
        other = copy(self)
        other.recipe = self.recipe.overridden(changes)
        kept = ("data", "runtime", "model_folder", "config", "_vocabulary", "free_bytes")
        always = ("recipe", "ranks", "planned", "on_rows", "say")
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
            **({} if self.ranks.alone else {"parallel": self.ranks.reason}),
        }
