"""Which layout a recipe's processes have: the recipe's own, or the one that the plan chooses."""

from __future__ import annotations

import torch

from llamaweft.parallel.layout import Layout
from llamaweft.parallel.methods import check_method
from llamaweft.pieces.pieces import Pieces
from llamaweft.plan.layouts import choose_layout, rank_budget
from llamaweft.plan.memory import Workload
from llamaweft.plan.rank import of_rank
from llamaweft.recipe import Recipe


def device_kind(recipe: Recipe) -> str:
    """cpu or cuda: what the ranks compute on."""
    asked = recipe.training.device
    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return asked.partition(":")[0]


def layout_of(recipe: Recipe, processes: int = 1, per_machine: int = 1) -> tuple[Layout, str]:
    """The mesh of so many processes, `per_machine` on each machine, and the reason for it.

    Raises UserError where nothing fits the memory that a rank may take.
    """
    keys = recipe.parallel
    if keys != "auto":
        layout = Layout.named(keys)
        return layout, f"{layout}: as the recipe says"
    if processes == 1:
        return Layout(), "one process"
    pieces = Pieces(recipe)
    on_cpu, accumulation = device_kind(recipe) == "cpu", recipe.training.gradient_accumulation_steps

    def work_of(layout: Layout) -> Workload:
        check_method(layout, recipe)
        codec = pieces.base_weights
        return of_rank(pieces.workload, layout, codec, mapped=on_cpu, packs=accumulation)

    choice = choose_layout(
        pieces.config,
        work_of,
        world=processes,
        per_node=per_machine,
        budget_bytes=rank_budget(
            recipe.training.memory_budget, pieces.free_bytes, per_machine if on_cpu else 1
        ),
        accumulation=accumulation,
        packs=pieces.loader.total_packs,
    )
    return choice.layout, choice.reason
