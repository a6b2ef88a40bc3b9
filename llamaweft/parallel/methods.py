"""Which methods of a recipe several ranks can share, and which not."""

from __future__ import annotations

from llamaweft.errors import UserError
from llamaweft.parallel.layout import Layout
from llamaweft.recipe import Recipe


def check_method(layout: Layout, recipe: Recipe) -> None:
    """Raises UserError for what a layout cannot do, with what it could."""
    training = recipe.training
    if layout.world > 1 and training.optimizer_in_backward:
        raise UserError(
            "training.optimizer_in_backward updates a weight before other ranks have added to its "
            f"gradient (parallel: {layout}); set it to false, or use parallel.shard to hold less"
        )
    if layout.shard > 1:
        _refuse(f"parallel.shard: {layout.shard}", _not_divided(recipe))
    if layout.tensor > 1:
        _refuse(f"parallel.tensor: {layout.tensor}", _not_divided(recipe) + _not_cut(recipe))


def _refuse(key: str, reasons: list[str]) -> None:
    if reasons:
        raise UserError(
            f"{key} does not go with this recipe: {reasons[0]}; change that, or use parallel.data "
            "alone"
        )


def _not_divided(recipe: Recipe) -> list[str]:
    """What needs matrices, or moments, that are in one piece."""
    adapter, found = recipe.adapter, []
    if adapter.top_layers is not None or adapter.modules_to_save is not None:
        key = "modules_to_save" if adapter.top_layers is None else "top_layers"
        found.append(f"adapter.{key} trains some matrices whole and freezes others")
    if recipe.training.optimizer == "adamw_8bit":
        found.append("training.optimizer: adamw_8bit has moments in blocks that would be cut")
    return found


def _not_cut(recipe: Recipe) -> list[str]:
    """What needs whole rows."""
    adapter, found = recipe.adapter, []
    if adapter.method == "dora":
        found.append("adapter.method: dora takes the norms of whole rows")
    if adapter.init_lora_weights != "default":
        found.append(
            f"adapter.init_lora_weights: {adapter.init_lora_weights} starts from whole matrices"
        )
    if recipe.data.new_tokens:
        found.append("data.new_tokens adds rows to a vocabulary that is cut")
    return found
