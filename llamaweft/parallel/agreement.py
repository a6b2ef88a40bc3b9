"""Whether all ranks are about to do the same run."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from importlib import metadata
from typing import Any

from llamaweft import __version__
from llamaweft.errors import UserError
from llamaweft.parallel.ranks import Ranks


def digest(content: Any) -> str:
    """Of anything that JSON can say."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def versions() -> str:
    """Of what computes."""
    return f"llamaweft {__version__}, torch {metadata.version('torch')}"


def check_same(ranks: Ranks, facts: dict[str, str]) -> None:
    """facts: by the name of what must be the same, what it is, or a digest of it. Raises UserError
    on every rank where one of them differs, with the ranks that have each."""
    found = ranks.gather(facts)
    for name in facts:
        holders = defaultdict(list)
        for rank, told in enumerate(found):
            holders[told[name]].append(rank)
        if len(holders) > 1:
            sides = "; ".join(f"{value} on {_named(of)}" for value, of in holders.items())
            raise UserError(
                f"{name} must be the same on all ranks, and differs: {sides}; give every machine "
                "the same files and the same installation"
            )


def _named(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + ", ..." * (len(ranks) > 8)
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"
