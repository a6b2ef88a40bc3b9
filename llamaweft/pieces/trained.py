"""What of a model is trained, how the rest is held, and on which packs."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

from torch import Tensor

from llamaweft.adapters.folder import CONFIG, check_same_adapter, read_adapter
from llamaweft.adapters.lora import LAYER_LINEARS, LoraConfig
from llamaweft.adapters.pissa import check_codec
from llamaweft.adapters.whole import (
    HEAD,
    WholeConfig,
    check_trained_once,
    check_whole,
    weighted_modules,
)
from llamaweft.data.loader import Loader
from llamaweft.data.targets import HEAD_TASKS
from llamaweft.errors import UserError
from llamaweft.model.head_config import HeadConfig
from llamaweft.model.llama import (
    empty_causal_lm,
)
from llamaweft.model.locate import base_name
from llamaweft.model.pack import Pack
from llamaweft.model.stores import own_codec, store_bytes
from llamaweft.pieces.given import Given, adapter_tokens


class Trained(Given):
    """What is trained, what is frozen, and the packs."""

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
                f"model: {base}, or where they are the same, say so in the {CONFIG} of a copy"
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

    @property
    def starts_as_base(self) -> bool:
        """Whether the untouched model is the base itself, number for number."""
        adapter = self.recipe.adapter
        fresh = adapter.init_from is None and adapter.modules_to_save is None
        return self.head is None and adapter.method == "lora" and fresh

    @property
    def base_weights(self) -> str:
        """The codec that frozen weights are held in; full fine-tuning holds all in fp32."""
        return self._base_weights[0]

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

    def check_start(self) -> None:
        """Raises UserError where the adapter cannot start from weights as they would be held."""
        if self.lora is not None and self.lora.is_pissa:
            check_codec(self.lora.init_lora_weights, *self._base_weights)

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
