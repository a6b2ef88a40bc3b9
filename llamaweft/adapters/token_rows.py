"""Rows of new tokens in an adapter folder, as PEFT's `trainable_token_indices` writes them.

The folder holds the rows themselves and no matrix of the vocabulary: PEFT puts them into a base
that has been given so many rows. Its AutoPeftModel classes do so by the tokenizer in the folder.
"""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor, nn

from llamaweft.errors import UserError
from llamaweft.weights.grown import ROWS, GrownWeight, row_parameters

INDICES = "trainable_token_indices"


def token_rows(model: nn.Module) -> dict[str, Tensor]:
    """The rows of new tokens under PEFT's names."""
    return {
        f"base_model.model.{name}.token_adapter.{ROWS}": rows.detach()
        for name, rows in row_parameters(model).items()
    }


def token_indices(model: nn.Module) -> dict[str, list[int]] | None:
    """PEFT's `trainable_token_indices`: module -> ids; None where there are none."""
    found = {}
    for name in row_parameters(model):
        weight = model.get_submodule(name).weight
        assert isinstance(weight, GrownWeight)
        found[name.rpartition(".")[2]] = list(range(weight.span.start, weight.span.stop))
    return found or None


def read_token_indices(folder: Path, config: str) -> list[int]:
    """The ids of an adapter folder's new tokens, in order. config: the name of its config file.

    Raises UserError where embedding and head have different ones.
    """
    indices = json.loads((folder / config).read_text(encoding="utf-8")).get(INDICES) or []
    each = list(indices.values()) if isinstance(indices, dict) else [indices]
    if any(of_module != each[0] for of_module in each):
        raise UserError(
            f"the adapter {folder} has {INDICES}: {indices}, and only the same tokens for all "
            "modules are supported"
        )
    return list(each[0]) if each else []
