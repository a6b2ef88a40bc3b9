"""Slurm's short forms: `gpu[01-03,7],x5` for names of nodes, `2(x3),1` for a count on each.

As `scontrol show hostnames` expands them (scontrol(1)); a name may have several brackets.
"""

from __future__ import annotations

import re
from itertools import product

from llamaweft.errors import UserError

MAX_NODES = 100_000
"""More than a cluster has: a list that names more is a mistake, and would fill the memory."""

_NAME = re.compile(r"(?:[A-Za-z0-9._-]|\[[0-9,-]+\])+")
_PART = re.compile(r"\[([0-9,-]+)\]|([A-Za-z0-9._-]+)")
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")
_COUNT = re.compile(r"(\d+)(?:\(x(\d+)\))?")


def nodes_of(text: str, variable: str = "the list of nodes") -> list[str]:
    """The names, in order. Raises UserError, which names the variable, for what is no such list."""
    names: list[str] = []
    for item in re.split(r",(?![^\[]*\])", text):  # commas outside of brackets
        if not _NAME.fullmatch(item):
            raise _no_list(variable, text)
        parts = [
            _numbers(bracket, variable, text) if bracket else [plain]
            for bracket, plain in _PART.findall(item)
        ]
        names += map("".join, product(*parts))
        if len(names) > MAX_NODES:
            raise _no_list(variable, text)
    return names


def _numbers(ranges: str, variable: str, text: str) -> list[str]:
    """`01-03,7` -> 01, 02, 03, 7: as wide as the first number of each range."""
    found: list[str] = []
    for part in ranges.split(","):
        match = _RANGE.fullmatch(part)
        if match is None:
            raise _no_list(variable, text)
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or last - first >= MAX_NODES:
            raise _no_list(variable, text)
        found += [str(number).zfill(len(match[1])) for number in range(first, last + 1)]
    return found


def counts_of(text: str, variable: str = "the counts") -> list[int]:
    """`2(x3),1` -> 2, 2, 2, 1. Raises UserError as `nodes_of`."""
    counts: list[int] = []
    for part in text.split(","):
        match = _COUNT.fullmatch(part)
        if match is None or int(match[2] or 1) > MAX_NODES:
            raise _no_list(variable, text)
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _no_list(variable: str, text: str) -> UserError:
    shown = text if len(text) <= 80 else f"{text[:80]}..."
    return UserError(f"{variable}: {shown!r} is not written as Slurm writes it")
