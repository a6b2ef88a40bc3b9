"""Plans of whole recipes: the nearest that fits, where none does."""

from __future__ import annotations

import pytest

from llamaweft.errors import UserError
from llamaweft.pieces.pieces import Pieces
from llamaweft.plan.memory import schedule
from llamaweft.planning import nearest_fit, plan_run
from llamaweft.recipe import Recipe


def least_bytes(pieces: Pieces) -> int:
    layers = pieces.config.num_hidden_layers
    return schedule(pieces.workload, [()] * layers).peak_bytes


def test_the_nearest_recipe_that_fits_is_named(recipe_tree: dict) -> None:
    recipe_tree["training"] |= {"micro_batch_tokens": 1024, "max_steps": 50}
    large = Pieces(Recipe.validate_tree(recipe_tree))
    small = large.changed({"training.micro_batch_tokens": "256"})
    budget = (least_bytes(large) + least_bytes(small)) // 2
    assert least_bytes(small) < budget < least_bytes(large)
    tight = large.changed({"training.memory_budget": str(budget)})
    changes = nearest_fit(tight)
    assert changes.startswith("training.micro_batch_tokens=")
    with pytest.raises(UserError, match=f"it fits with {changes}"):
        plan_run(tight)
    fitting = tight.changed(dict([changes.split("=")]))
    assert plan_run(fitting).fits
