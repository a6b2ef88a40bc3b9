"""What is trained whole where the rest of a model is frozen, as the plan needs to know it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from llamaweft.model.presets import LlamaConfig
from llamaweft.plan.shapes import LINEARS, linear_weights

VOCABULARY = ("embed_tokens", "lm_head")
_PLACE = re.compile(r"(?:^|\.)layers\.(\d+)\.")


@dataclass(frozen=True)
class Whole:
    """parameters: numbers that are trained, without those of an adapter or of a task's own head;
    largest: of one module. embedding, head: whether the vocabulary's matrix is trained at that end.
    linears: layer and name of the trained matrices. lowest: the lowest layer that the backward pass
    comes to. below_head: whether it goes on below the head at all."""

    parameters: int = 0
    largest: int = 0
    embedding: bool = False
    head: bool = False
    linears: tuple[tuple[int, str], ...] = ()
    lowest: int = 0
    below_head: bool = True


def whole_of(config: LlamaConfig, modules: Sequence[str], adapted: bool) -> Whole:
    """Of modules by their names in the causal model. adapted: whether there is an adapter too, in
    every layer."""
    numbers = {name: _numbers(config, name) for name in modules}
    embedding, head = (any(n.endswith(end) for n in modules) for end in VOCABULARY)
    if embedding and head and config.tie_word_embeddings:
        del numbers["lm_head"]
    layers = {name: int(found[1]) for name in modules if (found := _PLACE.search(name))}
    lowest = min(layers.values(), default=config.num_hidden_layers)
    return Whole(
        parameters=sum(numbers.values()),
        largest=max(numbers.values(), default=0),
        embedding=embedding,
        head=head,
        linears=tuple((layer, _end(n)) for n, layer in layers.items() if _end(n) in LINEARS),
        lowest=0 if adapted or embedding else lowest,
        below_head=adapted or any(_end(name) != "lm_head" for name in modules),
    )


def _end(name: str) -> str:
    return name.rpartition(".")[2]


def _numbers(config: LlamaConfig, name: str) -> int:
    if _end(name) in VOCABULARY:
        return config.vocab_size * config.hidden_size
    return linear_weights(config).get(_end(name), config.hidden_size)  # else a norm
