"""The plan: what a run will need, before it starts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from llamaweft.model.presets import parameter_count
from llamaweft.plan.flops import training_flops
from llamaweft.plan.memory import Schedule, Workload, trained_parameter_count

EFFICIENCY = {4: 0.7, 2: 0.4}
"""Share of the measured matmul rate that a step reaches, by bytes of the compute dtype: norms,
attention, adapters, casts and the optimizer take the rest. docs/plan.md has what was measured."""


@dataclass(frozen=True)
class Plan:
    """steps: optimizer steps. tokens: computed in the whole run. packs: in an epoch.
    fits: whether the peak is within what is free. flops_per_second: measured, of matmuls.
    decisions: what was chosen and why, one sentence each."""

    schedule: Schedule
    steps: int
    tokens: int
    packs_per_epoch: int
    parameters: int
    trained_parameters: int
    seconds_per_step: float
    total_seconds: float
    flops_per_second: float
    budget_bytes: int
    fits: bool
    decisions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        content = asdict(self)
        del content["schedule"]
        return content | self.schedule.to_dict()


def make_plan(
    work: Workload,
    schedule: Schedule,
    *,
    steps: int,
    mean_step_tokens: float,
    mean_step_labels: float,
    packs_per_epoch: int,
    flops_per_second: float,
    budget_bytes: int,
    decisions: dict[str, str],
) -> Plan:
    """Time from FLOPs and the measured matmul rate; what is recomputed costs a forward more."""
    frozen = work.rank is not None
    flops = training_flops(
        work.config, int(mean_step_tokens), int(mean_step_labels), frozen_base=frozen
    )
    again = schedule.recomputed_share / (2 if frozen else 3)
    seconds = flops * (1 + again) / (flops_per_second * EFFICIENCY[work.compute_bytes])
    return Plan(
        schedule=schedule,
        steps=steps,
        tokens=round(steps * mean_step_tokens),
        packs_per_epoch=packs_per_epoch,
        parameters=parameter_count(work.config),
        trained_parameters=trained_parameter_count(work),
        seconds_per_step=seconds,
        total_seconds=steps * seconds,
        flops_per_second=flops_per_second,
        budget_bytes=budget_bytes,
        fits=schedule.peak_bytes <= budget_bytes,
        decisions=decisions,
    )
