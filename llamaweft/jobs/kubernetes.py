"""Kubernetes: a TrainJob of Kubeflow Trainer 2.2 or newer, on its runtime `torch-distributed`.

Data, recipe and code are in the image, which is built from the Dockerfile; results are on a volume
that is asked for beside the job. The runtime tells torchrun of the nodes by PET_* variables.
"""

from __future__ import annotations

from typing import Any

from llamaweft.jobs import docker
from llamaweft.jobs.job import Job

TEMPLATES = docker.IMAGE | {"trainjob.yaml": "trainjob.yaml.jinja"}

PET = '"$PET_MASTER_ADDR:$PET_MASTER_PORT"'


def check(job: Job) -> None:
    """Nothing that a recipe can say is beyond Kubernetes."""


def values(job: Job) -> dict[str, Any]:
    return {
        "command": None,
        "start": f"exec {job.command(rendezvous=PET, identity=job.name)}",
        "access": "ReadWriteMany" if job.needs.nodes > 1 else "ReadWriteOnce",
        "mount": job.volume if job.volume.startswith("/") else f"/job/{job.volume}",
    }


def next_steps(job: Job) -> list[str]:
    return [
        f"docker build --tag {job.image_name} .",
        f"docker push {job.image_name}",
        "kubectl create secret generic hf-token --from-literal=token=$HF_TOKEN",
        "kubectl apply -f trainjob.yaml",
    ]
