"""Export: one merged Hugging Face folder that needs nothing of ours to run.

N: rows of a matrix that are taken at once   I: input features
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llamaweft.adapters.lora import LoraLinear
from llamaweft.model.llama import LlamaWithHead, Model, RMSNorm
from llamaweft.model.save import write_model
from llamaweft.model.task_heads import TaskHead
from llamaweft.weights.build import Source
from llamaweft.weights.codecs import PLAIN
from llamaweft.weights.frozen import FrozenWeight
from llamaweft.weights.grown import GrownWeight
from llamaweft.weights.linear import Embedding, Linear

Whole = Callable[[str, Tensor], Tensor]
"""A parameter's name and what this process holds of it -> all of it."""


def merged_sources(model: Model, whole: Whole = lambda name, held: held) -> Iterator[Source]:
    """Every tensor under its Hugging Face name, to be read a few rows at a time, adapters merged in
    fp32. The rows are valid until the next ones are read. whole: for what is trained whole, where
    several processes hold it; asked as the rows of a source are."""
    tied = model.config.tie_word_embeddings
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            shape = tuple(module.base_layer.weight.shape)
            yield Source(f"{name}.weight", shape, partial(_merged_rows, module))
        elif isinstance(module, Linear | Embedding):
            if not name.endswith(".base_layer") and not (tied and name == "lm_head"):
                shape = tuple(module.weight.shape)
                yield Source(
                    f"{name}.weight", shape, partial(_rows, module.weight, name=name, whole=whole)
                )
        elif isinstance(module, TaskHead):
            for part, value in module.named_parameters():
                yield Source(f"{name}.{part}", tuple(value.shape), partial(_rows, value))
        elif isinstance(module, RMSNorm):
            weight = module.weight
            yield Source(f"{name}.weight", tuple(weight.shape), partial(_rows, weight))


def merged_tensors(model: Model) -> Iterator[tuple[str, Tensor]]:
    """The same with each tensor whole, in memory of its own."""
    for source in merged_sources(model):
        yield source.name, torch.cat([rows.clone() for rows in source.chunks(source.shape[0])])


def _merged_rows(layer: LoraLinear, rows: int) -> Iterator[Tensor]:
    start = 0
    for base_NI in _rows(layer.base_layer.weight, rows):
        stop = start + len(base_NI)
        yield layer.merged_rows(base_NI, slice(start, stop))
        start = stop


def _rows(
    weight: nn.Parameter | FrozenWeight | GrownWeight,
    rows: int,
    name: str = "",
    whole: Whole = lambda name, held: held,
) -> Iterator[Tensor]:
    """A weight in fp32, `rows` rows at a time."""
    if isinstance(weight, GrownWeight):
        yield from _grown_rows(weight, rows)
    elif isinstance(weight, FrozenWeight) and weight.device.type == "cpu":
        for start in range(0, weight.shape[0], rows):
            yield weight.rows(start, min(start + rows, weight.shape[0]), torch.float32)
    elif isinstance(weight, FrozenWeight):  # a GPU decodes a matrix whole
        yield from weight.dequantised().split(rows)
    else:
        for part in whole(f"{name}.weight", weight.detach()).split(rows):
            yield part.float()


def _grown_rows(weight: GrownWeight, rows: int) -> Iterator[Tensor]:
    """The base's rows with the new ones in their places, then the new ones that follow."""
    new_NE, span, start = weight.new_NE.detach(), weight.span, 0
    for base_NE in _rows(weight.base, rows):
        stop = start + len(base_NE)
        first, last = max(start, span.start), min(stop, span.stop)
        if first < last:
            base_NE = base_NE.clone()
            base_NE[first - start : last - start] = new_NE[first - span.start : last - span.start]
        yield base_NE
        start = stop
    if start < span.stop:
        yield new_NE[start - span.start :]


def described(model: Model, tokenizer: Any) -> dict[str, Any]:
    """What config.json says of a model with a head, beside what it says of any: transformers reads
    the last token that is no padding. A reward is read so in training, where the end token pads if
    the tokenizer has no other."""
    if not isinstance(model, LlamaWithHead):
        return {}
    pad = tokenizer.pad_token_id
    if pad is None and model.head_config.task == "reward":
        pad = tokenizer.eos_token_id
    return model.head_config.to_config() | {"pad_token_id": pad}


def export_merged(
    model: Model,
    tokenizer: Any,
    folder: Path,
    dtype: str,
    stop_ids: Iterable[int],
    whole: Whole = lambda name, held: held,
) -> None:
    """Write the merged folder, a few rows of a matrix at a time. `dtype`: fp32 or bf16. whole: as
    `merged_sources` has it. Raises OSError."""
    write_model(
        folder,
        model.config,
        merged_sources(model, whole),
        tokenizer.save_pretrained,
        dtype=PLAIN[dtype],
        stop_ids=stop_ids,
        more=described(model, tokenizer),
    )
