"""Modules that are trained whole: beside an adapter, as PEFT's `modules_to_save`, or alone, where
the rest of the model is frozen.

A module is what holds weights of its own: an embedding, a linear layer, a norm, a head.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from llamaweft.errors import UserError

LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
"""The modules of the vocabulary, by their names in a causal model."""


@dataclass(frozen=True)
class WholeConfig:
    """top_layers: so many of the last layers, with all that is in them. modules: names of modules,
    or the ends of names, at a dot."""

    top_layers: int = 0
    modules: tuple[str, ...] = ()

    def among(self, names: Sequence[str], layers: int, tied: bool) -> tuple[str, ...]:
        """Those of `names` that are meant, in their order. layers: of the model. tied: whether
        embedding and head are one matrix, so that either means both.

        Raises UserError for more layers than there are, and for a module that there is none of.
        """
        if self.top_layers > layers:
            raise UserError(
                f"adapter.top_layers: {self.top_layers} is more than the {layers} layers that the "
                f"model has; set it to {layers} or less"
            )
        for module in self.modules:
            if not any(matches(name, module) for name in names):
                raise UserError(_unknown(module, names))
        chosen = {name for name in names if self._means(name, layers)}
        if tied and chosen & {EMBEDDING, HEAD}:
            chosen |= {EMBEDDING, HEAD} & set(names)
        return tuple(name for name in names if name in chosen)

    def said(self, layers: int) -> str:
        """It in words. layers: of the model."""
        top = [f"layers {layers - self.top_layers} to {layers - 1}"] if self.top_layers else []
        return ", ".join([*top, *self.modules])

    def _means(self, name: str, layers: int) -> bool:
        layer = LAYER.search(name)
        if layer and int(layer[1]) >= layers - self.top_layers:
            return True
        return any(matches(name, module) for module in self.modules)


def matches(name: str, end: str) -> bool:
    """Whether a module's name is `end`, or ends in it at a dot."""
    return name == end or name.endswith(f".{end}")


def check_trained_once(
    whole: Sequence[str], names: Sequence[str], targets: Sequence[str] | None, new_tokens: bool
) -> None:
    """whole: of the modules `names`. targets: of the adapter; None without one. new_tokens: whether
    the vocabulary gets rows that are trained.

    Raises UserError for a module that is adapted too, and for rows that would be trained twice or
    not at all.
    """
    for target in targets or ():
        for name in whole:
            if matches(name, target):
                raise UserError(
                    f"adapter.modules_to_save: {name} is adapted too (adapter.target_modules: "
                    f"{target}); take it out of one of them"
                )
    vocabulary = {EMBEDDING, HEAD} & {*names}
    if not new_tokens:
        return
    if targets is not None and vocabulary & {*whole}:
        raise UserError(
            "adapter.modules_to_save: the rows of data.new_tokens are trained beside the adapter "
            "already, and an adapter folder cannot hold both them and all of "
            f"{min(vocabulary & {*whole})}; take out one of them"
        )
    if targets is None and vocabulary - {*whole}:
        missing = " and ".join(n.rpartition(".")[2] for n in sorted(vocabulary - {*whole}))
        raise UserError(
            f"data.new_tokens: their rows would be frozen; add {missing} to "
            "adapter.modules_to_save, or set adapter.method: lora"
        )


def _unknown(module: str, names: Sequence[str]) -> str:
    known = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    near = difflib.get_close_matches(module, known, n=1, cutoff=0.5)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return (
        f"adapter.modules_to_save: the model has no module {module!r}{hint}; there are "
        f"{', '.join(known)}, and each with its place before it, as layers.0.{known[1]}"
    )


def weighted_modules(model: nn.Module) -> list[str]:
    """Names of the modules that hold weights of their own, those of one tied matrix both."""
    every = model.named_parameters(remove_duplicate=False)
    return list(dict.fromkeys(name.rpartition(".")[0] for name, _ in every))


def train_whole(model: nn.Module, modules: Sequence[nn.Module]) -> None:
    """Train these modules of `model` whole; an adapter folder then holds them under its own
    names of them."""
    ids = {id(module) for module in modules}
    names = tuple(name for name, module in model.named_modules() if id(module) in ids)
    for module in modules:
        module.requires_grad_(True)
    model.modules_to_save = (*names, *modules_to_save(model))  # type: ignore[assignment]


def check_whole(modules: Sequence[str], names: Sequence[str], tied: bool, where: str) -> None:
    """Whether a model with modules of these names can hold an adapter folder's whole modules.

    Raises UserError for an unknown one, and for one end of a tied matrix: PEFT unties it then.
    """
    for module in modules:
        if module not in names:
            raise UserError(
                f"{where} holds {module} whole, which the base model does not have; use the base "
                "model it was trained on"
            )
    ends = {EMBEDDING, HEAD} & {*modules}
    if tied and len(ends) == 1:
        raise UserError(
            f"{where} holds {min(ends)} alone, and the base model has one matrix for embedding and "
            "head; merge the adapter with what trained it, and use that as the model"
        )


def peft_names(model: nn.Module) -> list[str]:
    """What PEFT's `modules_to_save` says of a model. PEFT takes every module whose name ends so, in
    the middle of a word too (`norm` would be all norms), so a name is as long as it must be."""
    saved = {*modules_to_save(model)}
    every = [name for name, _ in model.named_modules(remove_duplicate=False)]
    found: dict[str, None] = {}
    for name in modules_to_save(model):
        parts = name.split(".")
        ends = (".".join(parts[-length:]) for length in range(1, len(parts) + 1))
        fits = (end for end in ends if all(n in saved for n in every if n.endswith(end)))
        found[next(fits, name)] = None
    return list(found)


def modules_to_save(model: nn.Module) -> tuple[str, ...]:
    """Modules that are trained whole, by their names in the model."""
    return tuple(getattr(model, "modules_to_save", ()))
