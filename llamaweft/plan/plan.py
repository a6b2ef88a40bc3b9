"""The plan: what a run will need, before it starts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from llamaweft.model.presets import parameter_count
from llamaweft.plan.memory import Schedule, Workload, trained_parameter_count
from llamaweft.plan.time import Speed, StepWork, step_seconds

LONG_SECONDS = 8 * 3600
"""From here on a plan says in words how long it will take."""


@dataclass(frozen=True)
class Plan:
    """What a run will need. seconds: of a mean step, by part; speed: what they were reckoned from.

    steps: optimizer steps. tokens: of the documents as given, computed_tokens: after shared
    prefixes, both in the whole run. packs: in an epoch. fits: whether the peak is within the
    budget. cost: at price_per_hour of each device. decisions: what was chosen and why, a sentence
    each. warnings: what may surprise.
    """

    schedule: Schedule
    steps: int
    tokens: int
    computed_tokens: int
    packs_per_epoch: int
    parameters: int
    trained_parameters: int
    seconds: dict[str, float]
    seconds_per_step: float
    total_seconds: float
    tokens_per_second: float
    speed: Speed
    price_per_hour: float | None
    cost: float | None
    budget_bytes: int
    fits: bool
    decisions: dict[str, str]
    warnings: list[str]

    def to_dict(self) -> dict[str, Any]:
        content = asdict(self)
        del content["schedule"]
        return content | self.schedule.to_dict()


def make_plan(
    work: Workload,
    schedule: Schedule,
    step: StepWork,
    speed: Speed,
    *,
    steps: int,
    given_tokens: float,
    packs_per_epoch: int,
    budget_bytes: int,
    decisions: dict[str, str],
    max_seconds: float | None = None,
    price_per_hour: float | None = None,
    seconds: dict[str, float] | None = None,
    devices: int = 1,
) -> Plan:
    """given_tokens: of the documents of a mean step. max_seconds: after which the run stops.
    price_per_hour: of a device. seconds: of a mean step on `devices` of them, by part; left out,
    those of one."""
    if seconds is None:
        seconds = step_seconds(work, schedule, step, speed)
    each = sum(seconds.values())
    total = steps * each
    warnings = []
    if total > LONG_SECONDS:
        warnings.append(
            f"at {given_tokens / each:.1f} tokens/s the {steps * given_tokens:,.0f} tokens of this "
            f"run take {total / 3600:.0f} hours; training.max_seconds stops it in time with "
            "everything saved"
        )
    if max_seconds is not None and total > max_seconds:
        warnings.append(
            f"training.max_seconds will stop it after about {max_seconds / each:.0f} of "
            f"{steps} steps"
        )
    return Plan(
        schedule=schedule,
        steps=steps,
        tokens=round(steps * given_tokens),
        computed_tokens=round(steps * step.tokens),
        packs_per_epoch=packs_per_epoch,
        parameters=parameter_count(work.config),
        trained_parameters=trained_parameter_count(work),
        seconds=seconds,
        seconds_per_step=each,
        total_seconds=total,
        tokens_per_second=given_tokens / each,
        speed=speed,
        price_per_hour=price_per_hour,
        cost=None if price_per_hour is None else total / 3600 * devices * price_per_hour,
        budget_bytes=budget_bytes,
        fits=schedule.peak_bytes <= budget_bytes,
        decisions=decisions,
        warnings=warnings,
    )
