"""The plan of a recipe on devices that are not here, as far as a job depends on it."""

from __future__ import annotations

from dataclasses import dataclass

from llamaweft.model.presets import parameter_count
from llamaweft.model.stores import store_bytes
from llamaweft.parallel.layout import Layout
from llamaweft.pieces.disk import disk_bytes
from llamaweft.plan.devices import find_device, find_machines
from llamaweft.planning import PiecesFor, PiecesForMany, named_layout, plan_run
from llamaweft.recipe import Recipe

HUB_BYTES_PER_PARAMETER = 2
"""A model of a hub is most often in a 16-bit type."""


@dataclass(frozen=True)
class Planned:
    """peak_bytes: of one device. seconds: of training. weight_bytes: of the base as it is held,
    which a host maps once; offloaded_bytes: of states that its memory holds instead of devices.
    disk_bytes: of a node: the model as it is downloaded and as it is held, and the run."""

    peak_bytes: int
    seconds: float
    weight_bytes: int
    offloaded_bytes: int
    disk_bytes: int
    layout: str


def planned(recipe: Recipe, device: str, devices: int, nodes: int) -> Planned:
    """devices: of each node. Raises UserError where it does not fit, with the nearest that does."""
    count = devices * nodes
    named_layout(recipe, count)
    pieces: PiecesFor | PiecesForMany
    if count == 1:
        pieces = PiecesFor(recipe, find_device(device))
        layout, offloaded = str(Layout()), 0
        plan = plan_run(pieces)
    else:
        pieces = PiecesForMany(recipe, find_machines(f"{count}x{device}", nodes))
        plan = plan_run(pieces)
        layout, offloaded = str(pieces.choice.layout), devices * pieces.option.host_bytes
    parameters = parameter_count(pieces.config)
    held = 4 * parameters if pieces.trains_all else store_bytes(pieces.config, pieces.base_weights)
    seconds = plan.total_seconds
    if recipe.training.max_seconds is not None:
        seconds = min(seconds, recipe.training.max_seconds)
    return Planned(
        peak_bytes=plan.schedule.peak_bytes,
        seconds=seconds,
        weight_bytes=held,
        offloaded_bytes=offloaded,
        disk_bytes=HUB_BYTES_PER_PARAMETER * parameters + held + disk_bytes(pieces),
        layout=layout,
    )
