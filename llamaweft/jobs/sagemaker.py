"""SageMaker: a script for version 3 of its Python SDK, whose `ModelTrainer` took the place of the
estimators. It runs the image of the Dockerfile.

Data, recipe and code are in the image. The run folder is in /opt/ml/checkpoints, which SageMaker
copies to S3 as it grows and back when the job is started again.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamaweft.errors import UserError
from llamaweft.jobs import docker
from llamaweft.jobs.job import Job, need_shared_folder
from llamaweft.jobs.needs import Needs

TEMPLATES = docker.IMAGE | {"sagemaker_job.py": "sagemaker.py.jinja"}

CHECKPOINTS = "/opt/ml/checkpoints"
RENDEZVOUS = '"$SM_MASTER_ADDR:$SM_MASTER_PORT"'


@dataclass(frozen=True)
class Instance:
    """Devices in it, memory of its host in GiB, and its own disk in GB; None: as large as asked."""

    name: str
    devices: int
    host_gib: int
    disk_gb: int | None


# aws.amazon.com/ec2/instance-types, the smallest first.
INSTANCES = {
    "h200": [Instance("ml.p5en.48xlarge", 8, 2048, 30_720)],
    "h100": [
        Instance("ml.p5.4xlarge", 1, 256, 3_840),
        Instance("ml.p5.48xlarge", 8, 2048, 30_720),
    ],
    "a100": [Instance("ml.p4de.24xlarge", 8, 1152, 8_000)],
    "a100-40gb": [Instance("ml.p4d.24xlarge", 8, 1152, 8_000)],
    "l40s": [
        Instance("ml.g6e.xlarge", 1, 32, 250),
        Instance("ml.g6e.2xlarge", 1, 64, 450),
        Instance("ml.g6e.4xlarge", 1, 128, 600),
        Instance("ml.g6e.8xlarge", 1, 256, 900),
        Instance("ml.g6e.12xlarge", 4, 384, 3_800),
        Instance("ml.g6e.48xlarge", 8, 1536, 7_600),
    ],
    "l4": [
        Instance("ml.g6.xlarge", 1, 16, 250),
        Instance("ml.g6.2xlarge", 1, 32, 450),
        Instance("ml.g6.4xlarge", 1, 64, 600),
        Instance("ml.g6.8xlarge", 1, 128, 900),
        Instance("ml.g6.12xlarge", 4, 192, 3_760),
        Instance("ml.g6.48xlarge", 8, 768, 7_520),
    ],
    "v100": [
        Instance("ml.p3.2xlarge", 1, 61, None),
        Instance("ml.p3.8xlarge", 4, 244, None),
        Instance("ml.p3.16xlarge", 8, 488, None),
    ],
    "t4": [
        Instance("ml.g4dn.xlarge", 1, 16, 125),
        Instance("ml.g4dn.2xlarge", 1, 32, 225),
        Instance("ml.g4dn.4xlarge", 1, 64, 225),
        Instance("ml.g4dn.8xlarge", 1, 128, 900),
        Instance("ml.g4dn.12xlarge", 4, 192, 900),
    ],
}


def instance_for(needs: Needs) -> Instance:
    """The smallest with exactly the devices asked for, and the memory and disk that they need.

    Raises UserError, with what there is, where none is.
    """
    found = INSTANCES.get(needs.device, [])
    for instance in found:
        enough = instance.host_gib >= needs.host_gib
        if instance.disk_gb is not None:
            enough = enough and instance.disk_gb >= needs.disk_gib * 1.074
        if instance.devices == needs.devices and enough:
            return instance
    there = ", ".join(f"{i.devices} ({i.name}, {i.host_gib} GiB)" for i in found)
    raise UserError(
        f"--device {needs.device} --devices {needs.devices}: SageMaker has no instance with "
        f"that many and {needs.host_gib} GiB of memory; it has {there or 'none'}"
    )


def check(job: Job) -> None:
    need_shared_folder(job, "SageMaker")
    instance_for(job.needs)


def values(job: Job) -> dict[str, Any]:
    output = "" if Path(job.output).is_absolute() else f"output_dir={CHECKPOINTS}/{job.name}"
    start = job.command(rendezvous=RENDEZVOUS, identity=job.name)
    return {
        "command": None,
        "instance": instance_for(job.needs).name,
        "start": f"cd /job && {start} {output}".strip(),
        "checkpoints": CHECKPOINTS,
    }


def next_steps(job: Job) -> list[str]:
    return [
        f"docker build --tag {job.image_name} .",
        f"docker push {job.image_name}",
        "pip install 'sagemaker>=3'",
        "SAGEMAKER_ROLE=arn:aws:iam::... python sagemaker_job.py",
    ]
