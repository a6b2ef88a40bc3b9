"""Holding rows out: which of them are only measured on."""

from __future__ import annotations

import numpy as np

from llamaweft.errors import UserError


def hold_out(keys_N: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """A mask over rows, True where held out: about `fraction` of them, at least one.

    keys_N: equal for rows that say the same; they stay on one side. The order of the rows does not
    matter. Raises UserError when that leaves nothing to train on.
    """
    groups, member_N, counts = np.unique(keys_N, return_inverse=True, return_counts=True)
    if len(groups) < 2:
        raise UserError(
            f"data.validation.fraction cannot hold out rows: there are {len(groups)} different "
            "rows and at least 2 are needed; add rows or set data.validation: null"
        )
    wanted = min(max(1, round(fraction * len(keys_N))), len(keys_N) - 1)
    order = np.random.default_rng([seed, 1]).permutation(len(groups))[:-1]
    enough = int(np.searchsorted(np.cumsum(counts[order]), wanted)) + 1
    held = np.zeros(len(groups), dtype=bool)
    held[order[:enough]] = True
    return held[member_N]
