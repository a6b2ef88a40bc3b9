"""Which layout a recipe's processes have: the recipe's own, or the one that the plan chooses."""

from __future__ import annotations

import torch

from llamaweft.parallel.environment import World
from llamaweft.parallel.layout import Layout
from llamaweft.recipe import Recipe


def device_kind(recipe: Recipe) -> str:
    """cpu or cuda: what the ranks compute on."""
    asked = recipe.training.device
    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return asked.partition(":")[0]


def layout_of(recipe: Recipe, world: World | None) -> Layout:
    """world: of this process, None where it is alone. Raises UserError where nothing fits."""
    keys, processes = recipe.parallel, 1 if world is None else world.world
    if keys != "auto":
        return Layout(keys.data, keys.shard, keys.tensor, keys.offload)
    if recipe.adapter.trains_all:
        return Layout(shard=processes)
    return Layout(data=processes)
