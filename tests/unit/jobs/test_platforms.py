"""What each platform's file makes of a job, without a plan."""

from __future__ import annotations

import re

import pytest
from job_of import GIB, job_of, needs_for

from llamaweft.errors import UserError
from llamaweft.jobs import docker, kubernetes, sagemaker, skypilot, slurm
from llamaweft.jobs.job import make_job
from llamaweft.jobs.sagemaker import instance_for
from llamaweft.jobs.slurm import slurm_time
from llamaweft.plan.devices import DEVICES
from llamaweft.recipe import Recipe


@pytest.mark.parametrize(
    ("output_dir", "name"),
    [
        ("runs/My run_1", "llamaweft-my-run-1"),
        ("runs/1", "llamaweft-1"),
        ("runs/" + "x" * 90, "llamaweft-" + "x" * 30),
        ("runs/" + "x" * 29 + "-zz", "llamaweft-" + "x" * 29),
        ("runs/Über-" + "y" * 28 + "-z", "llamaweft-ber-" + "y" * 26),
    ],
)
def test_a_name_is_a_label_everywhere(output_dir: str, name: str) -> None:
    assert job_of(output_dir=output_dir).name == name
    assert re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", name)


def test_one_process_needs_no_launcher() -> None:
    assert job_of().command() == "python -m llamaweft train recipe.yaml --resume"


def test_ranks_of_one_machine_need_no_address() -> None:
    command = job_of(needs_for(devices=4)).command()
    assert command.startswith("torchrun --standalone --nproc-per-node 4 ")
    assert command.endswith(" -m llamaweft train recipe.yaml --resume")
    assert "rdzv" not in command


def test_nodes_meet_at_the_first() -> None:
    command = job_of(needs_for(devices=8, nodes=2)).command("host:1", "7")
    assert "--nnodes 2 --rdzv-backend c10d --rdzv-endpoint host:1 --rdzv-id 7" in command
    assert "--nproc-per-node 8" in command


@pytest.mark.parametrize("output_dir", ["run", "../runs/x", "runs/../../x"])
def test_a_run_folder_is_in_a_folder_of_the_job(output_dir: str) -> None:
    recipe = Recipe.validate_tree(
        {"model": "o/n", "data": {"train": {"hub": "o/r"}}, "output_dir": output_dir}
    )
    with pytest.raises(UserError, match=f"output_dir: {re.escape(output_dir)} is to be a folder"):
        make_job(recipe, [needs_for()], {}, None)


@pytest.mark.parametrize(
    ("output_dir", "volume"), [("runs/a/b", "runs"), ("/shared/runs/a", "/shared/runs")]
)
def test_results_are_on_a_volume(output_dir: str, volume: str) -> None:
    assert job_of(output_dir=output_dir).volume == volume


def test_times_of_slurm() -> None:
    assert slurm_time(12_660) == "0-03:31:00"
    assert slurm_time(3 * 86_400 + 61) == "3-00:01:01"


def test_slurm_meets_under_the_number_of_its_job() -> None:
    command = slurm.values(job_of(needs_for(devices=8, nodes=2)))["command"]
    assert '--rdzv-endpoint "$head:29400" --rdzv-id "$SLURM_JOB_ID"' in command


def test_pods_meet_where_the_runtime_says() -> None:
    values = kubernetes.values(job_of(needs_for(nodes=2)))
    assert '--rdzv-endpoint "$PET_MASTER_ADDR:$PET_MASTER_PORT"' in values["start"]
    assert values["access"] == "ReadWriteMany"
    assert kubernetes.values(job_of())["access"] == "ReadWriteOnce"


def test_docker_is_one_machine() -> None:
    docker.check(job_of(needs_for(devices=8)))
    with pytest.raises(UserError, match="--nodes 2: docker runs a job on one machine"):
        docker.check(job_of(needs_for(nodes=2)))


@pytest.mark.parametrize(("platform", "named"), [(skypilot, "SkyPilot"), (sagemaker, "SageMaker")])
def test_nodes_without_a_shared_folder_are_refused(platform, named: str) -> None:
    job = job_of(needs_for(devices=8, nodes=2))
    with pytest.raises(UserError, match=f"output_dir: .* is on the disk of each node of {named}"):
        platform.check(job)
    platform.check(job_of(needs_for(devices=8, nodes=2), output_dir="/shared/x"))


def test_skypilot_knows_every_device() -> None:
    assert skypilot.ACCELERATORS.keys() == DEVICES.keys()


def test_skypilot_tables_seconds_and_cost() -> None:
    cheap = needs_for("l4", seconds=36_000.0, price=0.5, disk_bytes=90 * GIB, host_bytes=20 * GIB)
    job = job_of(needs_for(price=3.0), cheap, unfit={"t4": "too small\nand more"})
    values = skypilot.values(job)
    assert values["accelerators"] == ["H100:1", "L4:1"]
    assert [row.split() for row in values["rows"]] == [
        ["h100", "7,200", "3.00", "6.00"],
        ["l4", "36,000", "0.50", "5.00"],
    ]
    assert values["unfit"] == ["t4: too small"]
    assert (values["memory"], values["disk"]) == (20, 90)


def test_cost_is_of_all_devices() -> None:
    assert needs_for(devices=4, nodes=2, seconds=1800.0, price=3.0).cost == 12.0
    assert needs_for().cost is None


@pytest.mark.parametrize(
    ("device", "devices", "host", "disk", "name"),
    [
        ("t4", 1, 12, 80, "ml.g4dn.xlarge"),
        ("t4", 1, 17, 80, "ml.g4dn.2xlarge"),
        ("t4", 1, 12, 150, "ml.g4dn.2xlarge"),
        ("t4", 4, 48, 80, "ml.g4dn.12xlarge"),
        ("h100", 8, 200, 80, "ml.p5.48xlarge"),
        ("v100", 1, 12, 5000, "ml.p3.2xlarge"),
    ],
)
def test_the_smallest_instance_that_is_enough(
    device: str, devices: int, host: int, disk: int, name: str
) -> None:
    needs = needs_for(device, devices=devices, host_bytes=host * GIB, disk_bytes=disk * GIB)
    assert instance_for(needs).name == name


def test_there_is_no_such_instance() -> None:
    with pytest.raises(UserError, match=r"it has 1 \(ml\.p5\.4xlarge, 256 GiB\), 8 \(ml\.p5\.48"):
        instance_for(needs_for(devices=2))
    with pytest.raises(UserError, match="it has none"):
        instance_for(needs_for("rtx4090"))


def test_sagemaker_keeps_the_run_where_it_is_copied_from() -> None:
    start = sagemaker.values(job_of(needs_for("t4")))["start"]
    assert start.startswith("cd /job && python -m llamaweft train recipe.yaml --resume ")
    assert start.endswith("output_dir=/opt/ml/checkpoints/llamaweft-my-run-1")
    shared = sagemaker.values(job_of(needs_for("h100", devices=8, nodes=2), output_dir="/fsx/x"))
    assert "output_dir" not in shared["start"]
    assert "$SM_MASTER_ADDR:$SM_MASTER_PORT" in shared["start"]
