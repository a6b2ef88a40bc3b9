"""A step on many devices, by layout: memory, bytes sent, seconds, efficiency.

Everything here is reckoned from data sheets (plan/devices.py); nothing was measured. Communication
and computing are taken one after the other: no overlap.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from llamaweft.errors import UserError
from llamaweft.parallel.layout import Layout, check_model, check_packs
from llamaweft.plan.communication import HOST_COPY, Transfer, communication
from llamaweft.plan.devices import CALL_SECONDS, LINK_REACHED, REACHED, Machines
from llamaweft.plan.layouts import Choice, candidates, check_layout, choose_layout, least_bytes
from llamaweft.plan.memory import Schedule, Workload, schedule, solve
from llamaweft.plan.rank import host_bytes, of_rank, rank_step
from llamaweft.plan.time import Speed, StepWork, step_seconds


@dataclass(frozen=True)
class Scale:
    """A run on several devices.

    work: what one process that does all alone would have to do; on a GPU. codec: of frozen weights.
    step: a mean one, over all ranks together, with its packs. accumulation, packs: of a step, and
    in the whole run. budget_bytes: that a rank may take. check: raises UserError for a layout that
    the run's method does not go with.
    """

    machines: Machines
    work: Workload
    codec: str
    step: StepWork
    speed: Speed
    accumulation: int
    packs: int
    budget_bytes: int
    check: Callable[[Layout], None] = lambda layout: None

    def of_rank(self, layout: Layout) -> Workload:
        self.check(layout)
        return of_rank(self.work, layout, self.codec, mapped=False, packs=self.accumulation)

    def choose(self, named: Layout | None) -> Choice:
        """named: what the recipe says; None for `auto`. Raises UserError as choose_layout and
        check_layout do."""
        config, world = self.work.config, self.machines.count
        counts = {"world": world, "accumulation": self.accumulation, "packs": self.packs}
        if named is not None:
            self.check(named)
            return check_layout(named, config, **counts)
        return choose_layout(
            config,
            self.of_rank,
            per_node=self.machines.per_node,
            budget_bytes=self.budget_bytes,
            seconds_of=lambda layout: sum(self.option(layout).seconds.values()),
            **counts,
        )

    def option(self, layout: Layout) -> Option:
        """Raises UserError where the model or the packs do not allow the layout."""
        check_model(layout, self.work.config)
        check_packs(layout, self.accumulation, self.packs)
        work = self.of_rank(layout)
        fits = least_bytes(layout, self.work.config, self.of_rank) <= self.budget_bytes
        layers = [()] * work.config.num_hidden_layers
        solved = solve(work, self.budget_bytes) if fits else schedule(work, list(layers))
        step = rank_step(self.step, layout)
        sent = communication(work, layout, solved, self.codec, step)
        seconds = step_seconds(work, solved, step, self.speed)
        for transfer in sent:
            name = "host" if transfer.kind == HOST_COPY else "communication"
            seconds[name] = seconds.get(name, 0.0) + transfer.seconds(self.machines)
        return Option(
            layout=layout,
            schedule=solved,
            fits=fits,
            host_bytes=host_bytes(work, layout, self.codec),
            transfers=sent,
            seconds=seconds,
            efficiency=self.alone_seconds / (layout.world * sum(seconds.values())),
        )

    @property
    def alone_seconds(self) -> float:
        """Seconds of the step on one device, if that had memory for everything and recomputed
        nothing."""
        work = replace(self.work, accumulates=self.accumulation > 1)
        return sum(step_seconds(work, solve(work, None), self.step, self.speed).values())

    def options(self, chosen: Layout) -> list[Option | Refused]:
        """The chosen layout and the others there are, or why not, in the order in which they
        are tried."""
        layouts = list(candidates(self.machines.count, self.machines.per_node))
        if chosen not in layouts:
            layouts.insert(0, chosen)
        found: list[Option | Refused] = []
        for layout in layouts:
            try:
                found.append(self.option(layout))
            except UserError as error:
                found.append(Refused(layout, str(error)))
        return found


@dataclass(frozen=True)
class Refused:
    """A layout that the model or the packs do not allow."""

    layout: Layout
    why: str

    def to_dict(self) -> dict[str, Any]:
        return {"layout": str(self.layout), "why_not": self.why}


@dataclass(frozen=True)
class Option:
    """What a step costs under one layout, for the rank that has most to do.

    schedule: of a rank, the least one where nothing fits. host_bytes: in the host's memory.
    transfers: what a rank sends. seconds: by part. efficiency: what one device with memory for
    everything would take, over what all of these take together.
    """

    layout: Layout
    schedule: Schedule
    fits: bool
    host_bytes: int
    transfers: list[Transfer]
    seconds: dict[str, float]
    efficiency: float

    @property
    def payload_bytes(self) -> float:
        return sum(t.payload_bytes for t in self.transfers if t.kind != HOST_COPY)

    @property
    def wire_bytes(self) -> float:
        return sum(t.wire_bytes for t in self.transfers if t.kind != HOST_COPY)

    def to_dict(self) -> dict[str, Any]:
        return {
            "layout": str(self.layout),
            "peak_bytes": self.schedule.peak_bytes,
            "host_bytes": self.host_bytes,
            "fits": self.fits,
            "recomputed_share": self.schedule.recomputed_share,
            "payload_bytes": round(self.payload_bytes),
            "wire_bytes": round(self.wire_bytes),
            "seconds_per_step": sum(self.seconds.values()),
            "communication_seconds": self.seconds.get("communication", 0.0),
            "efficiency": self.efficiency,
            "transfers": [
                {
                    "what": t.what,
                    "kind": t.kind,
                    "group": t.group,
                    "ranks": t.ranks,
                    "payload_bytes": round(t.payload_bytes),
                    "wire_bytes": round(t.wire_bytes),
                    "calls": t.calls,
                }
                for t in self.transfers
            ],
        }


def assumptions(machines: Machines) -> list[str]:
    """What the seconds rest on, a sentence each. None of it was measured."""
    device = machines.device
    found = [
        f"products at {REACHED:.0%} of the data sheet's {device.flops / 1e12:,.0f} TFLOP/s",
    ]
    if machines.per_node > 1:
        found.append(
            f"{device.link_name} within a machine: {LINK_REACHED:.0%} of its data sheet's "
            f"{device.link / 1e9:,.0f} GB/s one way for each device"
        )
    if machines.nodes > 1:
        whose = "as asked for" if machines.node_gbit else "assumed"
        found.append(
            f"{machines.network_gbit:,.0f} Gbit/s of network one way for each machine, {whose} "
            f"(--network-gbit), {LINK_REACHED:.0%} of it reached"
        )
    found.append(
        f"rings, {CALL_SECONDS * 1e6:.0f} microseconds for each collective beside its bytes, no "
        "overlap of communication and computing"
    )
    found.append("packs of a step take equally long, and no device is slower than another")
    return found
