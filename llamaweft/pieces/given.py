"""What a recipe gives: its device, its model's config and tokenizer, its rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from llamaweft.adapters.folder import CONFIG
from llamaweft.adapters.token_rows import read_token_indices
from llamaweft.data.chat import special_ids
from llamaweft.data.general import General, general_prompts, read_general
from llamaweft.data.prepare import Preparation, Prepared
from llamaweft.data.targets import HEAD_TASKS
from llamaweft.model.folder import read_config
from llamaweft.model.head_config import HeadConfig
from llamaweft.model.locate import locate, usable
from llamaweft.model.new_tokens import NewTokens, add_new_tokens, named
from llamaweft.model.presets import LlamaConfig
from llamaweft.model.tokenizer import load_tokenizer, set_chat_template
from llamaweft.model.untrained import untrained_tokens
from llamaweft.parallel.ranks import ALONE, Ranks
from llamaweft.plan.hardware import available_bytes
from llamaweft.provenance import hub_commit, provenance
from llamaweft.recipe import Recipe
from llamaweft.runtime import Runtime, choose_runtime, environment
from llamaweft.train.run_folder import RunFolder, read_json


class Given:
    """A recipe, and what is built of it before anything is trained."""

    def __init__(self, recipe: Recipe, ranks: Ranks = ALONE) -> None:
        self.recipe, self.ranks = recipe, ranks
        self.on_rows: Callable[[int], None] = lambda rows: None
        self.say: Callable[[str], None] = lambda what: None
        """Told how many rows are prepared, and what takes long."""

    @cached_property
    def runtime(self) -> Runtime:
        training = self.recipe.training
        return choose_runtime(training.device, training.compute_dtype, self.ranks.local_rank)

    @property
    def device_name(self) -> str:
        threads = f"{self.runtime.threads} threads" if self.runtime.device.type == "cpu" else ""
        return f"{self.runtime.device} {threads}".strip()

    @cached_property
    def free_bytes(self) -> int:
        """Memory that this process may take: of a machine that several ranks share, its part."""
        free = available_bytes(self.runtime.device)
        if self.runtime.device.type == "cpu":
            free //= self.ranks.on_machine
        return min(self.ranks.gather(free))

    @cached_property
    def model_folder(self) -> Path:
        return usable(self._located)

    @cached_property
    def _located(self) -> Path:
        """What the model's name stands for, before it is converted to a folder that can be used."""
        recipe = self.recipe
        codec = "nf4" if recipe.base_weights == "auto" else recipe.base_weights
        return locate(
            recipe.model,
            self._began_with or recipe.model_revision,
            store_codec=None if recipe.adapter.trains_all else codec,
        )

    @property
    def model_commit(self) -> str | None:
        """The commit of a model of the hub; None for others."""
        return hub_commit(self._located)

    @property
    def _began_with(self) -> str | None:
        """The commit of a model of the hub that the run in output_dir began with, which it goes on
        with whatever its branch holds now."""
        folder = RunFolder(Path(self.recipe.output_dir))
        if not folder.holds_run or not folder.environment.exists():
            return None
        built = read_json(folder.environment).get("rebuild", {})
        return built.get("model_commit") if built.get("model") == self.recipe.model else None

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

    def environment(self, recipe_text: str) -> dict[str, Any]:
        """What environment.json says: the machine, what was decided, what the run is made of."""
        found = environment(self.runtime)
        names = [rows.name for rows in self.recipe.data.train]
        held = self.data.examples.stored.fingerprints
        return found | provenance(
            recipe_text=recipe_text,
            seed=self.recipe.training.seed,
            commit=str(found["commit"]),
            model=self.recipe.model,
            folder=self._located if self.model_commit else self.model_folder,
            sources=dict(zip(names, held, strict=True)),
        )

    @cached_property
    def general(self) -> General | None:
        """The general prompts that forgetting is measured on; None where it is not."""
        if self.recipe.forgetting is None:
            return None
        new = () if self.new_tokens is None else self.new_tokens.ids
        return read_general(general_prompts(self.recipe.forgetting.prompts), self.tokenizer, new)

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


def adapter_tokens(folder: Path) -> list[tuple[str, bool]]:
    """The new tokens whose rows an adapter folder holds, each with whether it is a control token:
    as `data.new_tokens` has them. Their names are in the tokenizer beside them.

    Raises UserError where that is missing or does not have them.
    """
    ids = read_token_indices(folder, CONFIG)
    return named(load_tokenizer(folder), ids) if ids else []
