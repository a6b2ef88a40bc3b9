"""SkyPilot: a task for whatever cloud has one of the devices, the cheapest first as SkyPilot finds
them. The table of seconds and cost is by the prices that were given; no price is known here."""

from __future__ import annotations

from typing import Any

from llamaweft.errors import UserError
from llamaweft.jobs.job import Job, need_shared_folder

TEMPLATES = {"job.yaml": "skypilot.yaml.jinja"}

ACCELERATORS = {
    "h200": "H200",
    "h100": "H100",
    "a100": "A100-80GB",
    "a100-40gb": "A100",
    "l40s": "L40S",
    "l4": "L4",
    "rtx4090": "RTX4090",
    "rtx3090": "RTX3090",
    "v100": "V100",
    "t4": "T4",
}
"""Our names of devices -> those of `sky gpus list --all`."""

IDLE_MINUTES = 15


def check(job: Job) -> None:
    need_shared_folder(job, "SkyPilot")
    for needs in job.candidates:
        if needs.device not in ACCELERATORS:
            raise UserError(
                f"--device {needs.device}: SkyPilot has no such accelerator; it has "
                f"{', '.join(ACCELERATORS)}"
            )


def values(job: Job) -> dict[str, Any]:
    return {
        "accelerators": [f"{ACCELERATORS[n.device]}:{n.devices}" for n in job.candidates],
        "memory": max(needs.host_gib for needs in job.candidates),
        "disk": max(needs.disk_gib for needs in job.candidates),
        "limit": max(needs.limit_seconds for needs in job.candidates),
        "rows": [_row(needs) for needs in job.candidates],
        "unfit": [f"{name}: {why.splitlines()[0]}" for name, why in job.unfit.items()],
        "idle_minutes": IDLE_MINUTES,
        "command": job.command(identity='"$SKYPILOT_TASK_ID"'),
    }


def _row(needs: Any) -> str:
    price = "not given" if needs.price is None else f"{needs.price:,.2f}"
    cost = "" if needs.cost is None else f"{needs.cost:,.2f}"
    return f"{needs.device:<10} {needs.seconds:>12,.0f} {price:>10} {cost:>12}"


def next_steps(job: Job) -> list[str]:
    place = job.output if job.output.startswith("/") else f"sky_workdir/{job.output}"
    return [f"sky launch -c {job.name} job.yaml", f"rsync -a {job.name}:{place} ."]
