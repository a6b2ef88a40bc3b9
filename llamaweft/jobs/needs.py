"""What a job asks a platform for, from the plan of its recipe: devices, memory of the host, disk
and time. The plan is by a device's data sheet; what is added to it here is an assumption, named.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from llamaweft.errors import UserError
from llamaweft.jobs.planned import Planned, planned
from llamaweft.plan.devices import DEVICES, find_device
from llamaweft.recipe import Recipe

HOST_BYTES_PER_PROCESS = 6 * 2**30
"""Of the host, for each process: Python, torch with the CUDA libraries, rows and the workers that
prepare them. An assumption; beside it, the base's weights are mapped once on a node."""

CPUS_PER_DEVICE = 4
"""An assumption: one that feeds the device, and others for rows, checkpoints and the driver."""

SOFTWARE_BYTES = 30 * 2**30
"""Disk for the system and for torch with the CUDA libraries. An assumption."""

TIME_FACTOR, TIME_BESIDE_SECONDS = 1.5, 1800
"""The limit of time is the plan's seconds of training so often, and this for what the plan leaves
out: installing, downloading, converting weights, measuring. Assumptions."""


@dataclass(frozen=True)
class Needs:
    """Of one node: host_bytes, disk_bytes, cpus. peak_bytes: of one device, out of usable_bytes.
    seconds: of training, by the plan; limit_seconds: after which the platform may end the job.
    price: of one device for an hour; cost: of `seconds` on all devices, None without a price."""

    device: str
    devices: int
    nodes: int
    peak_bytes: int
    usable_bytes: int
    host_bytes: int
    disk_bytes: int
    seconds: float
    limit_seconds: int
    price: float | None
    layout: str

    @property
    def cpus(self) -> int:
        return CPUS_PER_DEVICE * self.devices

    @property
    def processes(self) -> int:
        """Of all nodes."""
        return self.nodes * self.devices

    @property
    def host_gib(self) -> int:
        return math.ceil(self.host_bytes / 2**30)

    @property
    def disk_gib(self) -> int:
        return math.ceil(self.disk_bytes / 2**30)

    @property
    def cost(self) -> float | None:
        hours = self.processes * self.seconds / 3600
        return None if self.price is None else hours * self.price

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"cpus": self.cpus, "cost": self.cost}


def needs_of(
    recipe: Recipe, device: str, devices: int, nodes: int, price: float | None = None
) -> Needs:
    """Raises UserError where the run does not fit so many of the device, with the nearest that
    does, and where the recipe asks for what they are not."""
    sheet = find_device(device)
    asked = recipe.training.device
    if asked not in ("auto", "cuda"):
        raise UserError(
            f"training.device: {asked}, and the job runs on {sheet.name}; set training.device=auto"
        )
    budget = recipe.training.memory_budget
    if budget is not None and budget > sheet.usable_bytes:
        raise UserError(
            f"training.memory_budget: {budget / 2**30:.1f} GiB is more than the "
            f"{sheet.usable_bytes / 2**30:.1f} GiB of {sheet.name} that can be used; lower it, or "
            "set training.memory_budget=null"
        )
    found = planned(recipe, device, devices, nodes)
    return Needs(
        device=device.lower(),
        devices=devices,
        nodes=nodes,
        peak_bytes=found.peak_bytes,
        usable_bytes=sheet.usable_bytes,
        host_bytes=devices * HOST_BYTES_PER_PROCESS + found.weight_bytes + found.offloaded_bytes,
        disk_bytes=SOFTWARE_BYTES + found.disk_bytes,
        seconds=found.seconds,
        limit_seconds=_limit(found),
        price=price,
        layout=found.layout,
    )


def _limit(found: Planned) -> int:
    """Whole minutes."""
    return 60 * math.ceil((TIME_FACTOR * found.seconds + TIME_BESIDE_SECONDS) / 60)


def candidates(
    recipe: Recipe, device: str, devices: int, nodes: int, prices: Mapping[str, float]
) -> tuple[list[Needs], dict[str, str]]:
    """The asked device first, then every other that has a price and fits, the cheapest first; and
    of those that do not fit, why. Raises UserError as `needs_of`, for the asked device."""
    for name in prices:
        find_device(name)
    prices = {name.lower(): price for name, price in prices.items()}
    first = needs_of(recipe, device, devices, nodes, prices.get(device.lower()))
    others, unfit = [], {}
    for name in (name for name in DEVICES if name in prices and name != first.device):
        try:
            others.append(needs_of(recipe, name, devices, nodes, prices[name]))
        except UserError as error:
            unfit[name] = str(error)
    return [first, *sorted(others, key=lambda needs: needs.cost or 0.0)], unfit
