"""Spreading a model over the ranks of a run, as its layout says."""

from __future__ import annotations

from typing import Any

import torch

from llamaweft.parallel.ranks import Ranks


def spread(model: Any, ranks: Ranks) -> None:
    """Cut a model's matrices over the tensor ranks, then hold what is left of them in parts over
    the shard ranks. All ranks must have the same model, which may be one whose matrices are the
    pages of its files (model/load.py); one process alone keeps it as it is.

    Raises UserError where a matrix cannot be cut so.
    """
    if ranks.mesh is None:
        return
    layout = ranks.layout
    if layout.tensor > 1:
        from llamaweft.parallel.tensor import cut

        ranks.cuts = cut(model, ranks.mesh["tensor"])
    if layout.shard > 1:
        from llamaweft.parallel.shard import shard

        shard(model, ranks.mesh["shard"], offload=layout.offload)
    if layout.shard > 1 or layout.tensor > 1:
        from llamaweft.parallel.shard import settle

        settle(model, torch.device(ranks.mesh.device_type))


def let_go(model: Any, ranks: Ranks) -> None:
    """Give back what was gathered of a model, so that its parameters are what each rank holds."""
    if ranks.layout.shard > 1:
        from llamaweft.parallel.shard import reshard

        reshard(model)
