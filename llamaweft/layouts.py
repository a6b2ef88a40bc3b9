"""Which layout a recipe's processes have: the recipe's own, or the one that the plan chooses."""

from __future__ import annotations

from dataclasses import replace

import torch

from llamaweft.parallel.layout import Layout
from llamaweft.parallel.methods import check_method
from llamaweft.pieces.pieces import Pieces
from llamaweft.plan.devices import Machines, device_called
from llamaweft.plan.hardware import available_bytes
from llamaweft.plan.layouts import Choice, choose_layout, rank_budget
from llamaweft.plan.memory import Workload
from llamaweft.plan.rank import of_rank
from llamaweft.planning import PiecesForMany
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
    choice = _choice_by_links(recipe, processes, per_machine) or _choice_by_order(
        recipe, processes, per_machine
    )
    return choice.layout, choice.reason


def _choice_by_links(recipe: Recipe, processes: int, per_machine: int) -> Choice | None:
    """On devices whose data sheet says how fast their links are; None on others."""
    if device_kind(recipe) == "cpu" or processes % per_machine:
        return None
    device = device_called(torch.cuda.get_device_name())
    if device is None:
        return None
    machines = Machines(device, processes, processes // per_machine)
    free = available_bytes(torch.device("cuda"))
    scale = replace(
        PiecesForMany(recipe, machines).scale,
        budget_bytes=rank_budget(recipe.training.memory_budget, free, 1),
    )
    return scale.choose(None)


def _choice_by_order(recipe: Recipe, processes: int, per_machine: int) -> Choice:
    pieces = Pieces(recipe)
    on_cpu, accumulation = device_kind(recipe) == "cpu", recipe.training.gradient_accumulation_steps

    def work_of(layout: Layout) -> Workload:
        check_method(layout, recipe)
        codec = pieces.base_weights
        return of_rank(pieces.workload, layout, codec, mapped=on_cpu, packs=accumulation)

    return choose_layout(
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
