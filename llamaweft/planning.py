"""From a recipe's pieces to its plan: for this machine, measured, or by a data sheet."""

from __future__ import annotations

from collections import Counter
from functools import cached_property
from typing import Any

import torch

from llamaweft.errors import UserError
from llamaweft.model.speed import layer_seconds
from llamaweft.model.stores import OWN
from llamaweft.parallel.layout import DIMENSIONS, Layout
from llamaweft.parallel.methods import check_method
from llamaweft.pieces.mean_pack import mean_pack
from llamaweft.pieces.pieces import Pieces
from llamaweft.plan.devices import REACHED, Device, Machines
from llamaweft.plan.flops import middle_layer_flops
from llamaweft.plan.hardware import matmul_flops_per_second, traffic_bytes_per_second
from llamaweft.plan.layouts import Choice
from llamaweft.plan.memory import MLP_TILE_TOKENS, Schedule, solve
from llamaweft.plan.plan import Plan, make_plan
from llamaweft.plan.rank import rank_step
from llamaweft.plan.scale import Option, Scale, assumptions
from llamaweft.plan.shapes import LINEARS, sizes
from llamaweft.plan.time import Speed, StepWork, step_seconds
from llamaweft.recipe import Recipe
from llamaweft.runtime import COMPUTE_DTYPES, Runtime
from llamaweft.weights.matmul import product
from llamaweft.weights.speed import product_rates

LAYER_SECONDS = {"cpu": 0.010, "cuda": 0.003}
"""What the calls of one layer's forward and backward pass take, where no layer is run to find out.
The CPU's was fitted to the 135M with packs of 256 tokens; the GPU's is an assumption."""

LAYER_FLOPS = 0.5e12
"""A layer is run on no more tokens than take so much arithmetic: a few seconds on a small CPU."""


class PiecesFor(Pieces):
    """The pieces as they would be on a device that is not here."""

    def __init__(self, recipe: Recipe, device: Device) -> None:
        super().__init__(recipe)
        self.planned = device

    @cached_property
    def runtime(self) -> Runtime:
        asked = self.recipe.training.compute_dtype
        name = self.planned.dtype if asked == "auto" else asked
        reason = f"{self.planned.name}, by its data sheet" if asked == "auto" else "asked for"
        return Runtime(torch.device("cuda"), COMPUTE_DTYPES[name], reason, 0)

    @cached_property
    def free_bytes(self) -> int:
        return self.planned.usable_bytes

    @property
    def device_name(self) -> str:
        return f"{self.planned.name} (not measured)"

    @property
    def runs_a_layer(self) -> bool:
        return False

    @cached_property
    def untrained_tokens(self) -> list[int]:
        """None are known of a folder without weights."""
        return super().untrained_tokens if self._has_weights else []

    @property
    def _has_weights(self) -> bool:
        folder = self.model_folder
        return (folder / OWN).is_dir() or any(folder.glob("model*.safetensors"))

    def decisions(self) -> dict[str, str]:
        found = super().decisions()
        if not self._has_weights:
            found["model"] += "; its folder holds no weights"
        return found


class PiecesForMany(PiecesFor):
    """The pieces as they would be on several devices that are not here: the schedule is that of one
    rank."""

    def __init__(self, recipe: Recipe, machines: Machines) -> None:
        super().__init__(recipe, machines.device)
        self.machines = machines

    @cached_property
    def scale(self) -> Scale:
        loader = self.loader
        packs = loader.total_packs / loader.total_steps
        return Scale(
            self.machines,
            self.workload,
            self.base_weights,
            mean_step(self, packs),
            speed_of(self, 0),
            accumulation=self.recipe.training.gradient_accumulation_steps,
            packs=loader.total_packs,
            budget_bytes=self.budget_bytes,
            check=lambda layout: check_method(layout, self.recipe),
        )

    @cached_property
    def choice(self) -> Choice:
        return self.scale.choose(named_layout(self.recipe, self.machines.count))

    @cached_property
    def option(self) -> Option:
        return self.scale.option(self.choice.layout)

    @cached_property
    def schedule(self) -> Schedule:
        """Raises UserError where a rank does not fit its memory."""
        if not self.option.fits:
            solve(self.scale.of_rank(self.choice.layout), self.budget_bytes)
        return self.option.schedule

    @property
    def device_name(self) -> str:
        return f"{self.machines} (not measured)"

    def changed(self, changes: dict[str, str]) -> PiecesForMany:
        other = super().changed(changes)
        assert isinstance(other, PiecesForMany)
        other.machines = self.machines
        return other

    def decisions(self) -> dict[str, str]:
        return super().decisions() | {"parallel": self.choice.reason}


def named_layout(recipe: Recipe, world: int) -> Layout | None:
    """The mesh that a recipe names; None where the plan shall choose. Raises UserError where it has
    other than `world` places."""
    named = recipe.parallel
    if named == "auto":
        return None
    layout = Layout.named(named)
    if layout.world != world:
        raise UserError(
            f"parallel: {layout.sizes} is {layout.world} ranks, and --devices has {world}; change "
            "one of them, or set parallel: auto"
        )
    return layout


def plan_run(pieces: Pieces, price_per_hour: float | None = None) -> Plan:
    """Memory, time and decisions; measures this machine's products for a few seconds.

    Raises UserError when nothing fits the budget, with the nearest recipe that does, and when the
    adapter cannot start from the weights as they would be held.
    """
    pieces.check_start()
    loader = pieces.loader
    given, computed, _ = loader.epoch_tokens
    packs = loader.packs_per_epoch
    per_step = loader.total_packs / loader.total_steps / packs
    seconds, devices = None, 1
    try:
        schedule = pieces.schedule
        if isinstance(pieces, PiecesForMany):
            speed, seconds, devices = (
                pieces.scale.speed,
                pieces.option.seconds,
                pieces.machines.count,
            )
        elif pieces.runs_a_layer:
            speed = speed_of_layers(pieces)
            schedule = pieces.schedule  # what the process holds was measured anew
            seconds = _seconds_of_a_rank(pieces, schedule, speed)
        else:
            speed = speed_of(pieces, int(computed / packs))
    except UserError as error:
        nearest = nearest_fit(pieces)
        raise UserError(f"{error}{nearest and f'; it fits with {nearest}'}") from None
    return make_plan(
        pieces.workload,
        schedule,
        mean_step(pieces, loader.total_packs / loader.total_steps),
        speed,
        steps=loader.total_steps,
        given_tokens=given * per_step,
        packs_per_epoch=packs,
        budget_bytes=pieces.budget_bytes,
        decisions=pieces.decisions(),
        max_seconds=pieces.recipe.training.max_seconds,
        price_per_hour=price_per_hour,
        seconds=seconds,
        devices=devices,
    )


def _seconds_of_a_rank(pieces: Pieces, schedule: Schedule, speed: Speed) -> dict[str, float] | None:
    """Of a mean step on the rank that has the most packs, without what ranks send each other; None
    of one process alone."""
    if pieces.ranks.alone:
        return None
    loader, layout = pieces.loader, pieces.ranks.layout
    step = rank_step(mean_step(pieces, loader.total_packs / loader.total_steps), layout)
    seconds = step_seconds(pieces.workload, schedule, step, speed)
    return {name: taken / layout.tensor for name, taken in seconds.items()}


def mean_step(pieces: Pieces, packs: float) -> StepWork:
    """What a mean step of the run has to do, over all ranks together. packs: that it is said to
    come in."""
    loader = pieces.loader
    _, computed, labels = loader.epoch_tokens
    share = loader.total_packs / loader.total_steps / loader.packs_per_epoch
    return StepWork(computed * share, labels * share, loader.epoch_squares * share, packs)


def scale_of(pieces: PiecesForMany) -> dict[str, Any]:
    """What a plan says of several devices: the layout and the others there are, and what the
    seconds rest on."""
    machines, layout = pieces.machines, pieces.choice.layout
    return {
        "devices": machines.count,
        "nodes": machines.nodes,
        "network_gbit": machines.network_gbit if machines.nodes > 1 else None,
        "layout": str(layout),
        "parallel": {name: getattr(layout, name) for name in (*DIMENSIONS, "offload")},
        "efficiency": pieces.option.efficiency,
        "host_bytes": pieces.option.host_bytes,
        "layouts": [option.to_dict() for option in pieces.scale.options(layout)],
        "assumptions": assumptions(machines),
    }


def speed_of(pieces: Pieces, pack_tokens: int) -> Speed:
    """What the device does in a second: by its data sheet, or measured with the model's own
    products, of a mean pack's rows."""
    if isinstance(pieces, PiecesFor):
        sheet = pieces.planned
        rate = REACHED * sheet.flops
        source = f"the data sheet of {sheet.name}, {REACHED:.0%} of its rate; not measured"
        return Speed(rate, rate, sheet.bandwidth, LAYER_SECONDS["cuda"], source, measured=False)
    runtime, size = pieces.runtime, sizes(pieces.config)
    tokens = max(1, min(pack_tokens, MLP_TILE_TOKENS))
    if runtime.device.type != "cpu":
        shape = (tokens, size["hidden"], size["inner"])
        plain = matmul_flops_per_second(runtime.device, runtime.compute_dtype, shape)
        decoded = plain
    else:
        shapes = Counter((size[target], size[source]) for source, target in LINEARS.values())
        # A trained weight is multiplied as a plain one.
        codec = pieces.base_weights
        decoded, plain = product_rates(shapes, tokens, codec, runtime.compute_dtype)
        if pieces.trains_all:
            decoded = plain
    traffic = traffic_bytes_per_second(runtime.device)
    calls = LAYER_SECONDS[runtime.device.type]
    return Speed(decoded, plain, traffic, calls, "measured on this machine", measured=True)


def speed_of_layers(pieces: Pieces) -> Speed:
    """What the device does in a second, measured by running a layer and the head of this model on
    some of the run's own documents."""
    runtime, config, size = pieces.runtime, pieces.config, sizes(pieces.config)
    pieces.settle_memory()
    most = int(LAYER_FLOPS / middle_layer_flops(config, 1, frozen_base=True))
    pack, squares, labels = mean_pack(pieces, max(most, 16))
    layer = layer_seconds(
        config,
        pack,
        squares,
        labels,
        codec=None if pieces.trains_all else pieces.base_weights,
        compute_dtype=runtime.compute_dtype,
        device=runtime.device,
        adapt=pieces.adapt_to_measure,
        keepable=pieces.workload.keepable,
        mlp_tile_tokens=MLP_TILE_TOKENS,
        predicts_tokens=pieces.head is None,
    )
    pieces.ran_a_layer()
    flops = middle_layer_flops(config, pack.tokens, frozen_base=not pieces.trains_all)
    shape = (min(pack.tokens, MLP_TILE_TOKENS), size["hidden"], min(size["inner"], 1024))
    plain = matmul_flops_per_second(runtime.device, runtime.compute_dtype, shape, 0.1, product)
    traffic = traffic_bytes_per_second(runtime.device, 0.1)
    source = "measured on this machine by running a layer"
    return Speed(flops / layer.kept, plain, traffic, 0.0, source, measured=True, layer=layer)


def nearest_fit(pieces: Pieces) -> str:
    """Overrides that make the recipe fit its budget and change the least; empty if none does."""
    training = pieces.recipe.training
    longest = max(len(document.ids) for document in pieces.data.documents)
    packs = [training.micro_batch_tokens]
    while packs[-1] // 2 >= longest:
        packs.append(packs[-1] // 2)
    if packs[-1] > longest:
        packs.append(longest)
    on_cpu = pieces.runtime.device.type == "cpu"
    codecs = ["nf4"] if not on_cpu and pieces.base_weights != "nf4" else []
    for method in [{}, {"adapter.method": "lora"}] if pieces.trains_all else [{}]:
        for codec in [None, *codecs]:
            for tokens in packs:
                changes = dict(method)
                if codec:
                    changes["base_weights"] = codec
                if tokens != training.micro_batch_tokens:
                    changes["training.micro_batch_tokens"] = str(tokens)
                if _fits(pieces, changes):
                    return " ".join(f"{key}={value}" for key, value in changes.items())
    return ""


def _fits(pieces: Pieces, changes: dict[str, str]) -> bool:
    try:
        other = pieces.changed(changes)
        return other.schedule.peak_bytes <= other.budget_bytes
    except UserError:
        return False
