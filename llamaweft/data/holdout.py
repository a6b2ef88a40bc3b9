"""Holding rows out: which examples are only measured on."""

from __future__ import annotations

import numpy as np

from llamaweft.data.formats import Example
from llamaweft.errors import UserError


def hold_out(examples: list[Example], fraction: float, seed: int) -> np.ndarray:
    """A mask over `examples`, True where held out: about `fraction` of them, at least one.

    Rows that say the same stay on one side. Raises UserError when that leaves nothing to train on.
    """
    groups: dict[str, list[int]] = {}
    for index, example in enumerate(examples):
        groups.setdefault(example.key, []).append(index)
    if len(groups) < 2:
        raise UserError(
            f"data.validation.fraction cannot hold out rows: there are {len(groups)} different "
            "rows and at least 2 are needed; add rows or set data.validation: null"
        )
    wanted = min(max(1, round(fraction * len(examples))), len(examples) - 1)
    held = np.zeros(len(examples), dtype=bool)
    members = list(groups.values())
    for group in np.random.default_rng([seed, 1]).permutation(len(members))[:-1]:
        if held.sum() >= wanted:
            break
        held[members[group]] = True
    return held
