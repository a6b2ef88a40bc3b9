"""Processes recognised from the variables that their launchers document.

torchrun: docs.pytorch.org/docs/stable/elastic/run.html, "Environment Variables". Slurm:
slurm.schedmd.com/srun.html, "OUTPUT ENVIRONMENT VARIABLES", and sbatch.html for the batch script.
Kubeflow: kubeflow/trainer, pkg/runtime/framework/plugins/torch, and the training-operator's
pkg/controller.v1/pytorch/envvar.go. SageMaker: aws/sagemaker-training-toolkit,
ENVIRONMENT_VARIABLES.md.
"""

from __future__ import annotations

import pytest

from llamaweft.errors import UserError
from llamaweft.parallel.environment import Node, World, node_of, to_env, world_of
from llamaweft.parallel.nodelist import counts_of, nodes_of

TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2", "MASTER_ADDR": "node-a", "MASTER_PORT": "29500",
    "TORCHELASTIC_RESTART_COUNT": "2", "TORCHELASTIC_RUN_ID": "job-7",
}  # fmt: skip
SRUN = {
    "SLURM_JOB_ID": "200505", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "6", "SLURM_PROCID": "4",
    "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_JOB_NODELIST": "gnode[09-11,25]",
    "SLURM_STEP_NUM_TASKS": "6", "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gnode[10,25]", "SLURM_STEP_TASKS_PER_NODE": "3(x2)",
}  # fmt: skip
SBATCH = {
    "SLURM_JOB_ID": "200505", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "gnode[10,20,25,37]", "SLURM_NNODES": "4",
    "SLURM_TASKS_PER_NODE": "1(x4)", "SLURM_JOB_GPUS": "2",
}  # fmt: skip
SALLOC = SBATCH | {
    "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_NODELIST": "gnode10", "SLURM_STEP_TASKS_PER_NODE": "1",
}  # fmt: skip
TRAINJOB = {
    "PET_NNODES": "30", "PET_NPROC_PER_NODE": "3", "PET_NODE_RANK": "12",
    "PET_MASTER_ADDR": "tune-node-0-0.tune", "PET_MASTER_PORT": "29400",
    "KUBERNETES_SERVICE_HOST": "10.0.0.1",
}  # fmt: skip
PYTORCHJOB = {
    "RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "tune-master-0", "MASTER_PORT": "23456",
    "PET_NPROC_PER_NODE": "auto", "PET_NODE_RANK": "1", "PET_NNODES": "2",
    "KUBERNETES_SERVICE_HOST": "10.0.0.1",
}  # fmt: skip
SAGEMAKER = {
    "SM_HOSTS": '["algo-1","algo-2"]', "SM_CURRENT_HOST": "algo-2", "SM_NUM_GPUS": "8",
    "SM_NUM_CPUS": "96", "SM_MODEL_DIR": "/opt/ml/model", "SM_NETWORK_INTERFACE_NAME": "eth0",
}  # fmt: skip
RESOURCES = '{"current_host":"algo-1","hosts":["algo-2","algo-1"],"network_interface_name":"eth0"}'
PORT = 20_000 + 200_505 % 10_000

RANKS = {
    "torchrun": (TORCHRUN, World(5, 8, 1, 4, "node-a", 29500, "torchrun", 2)),
    "accelerate": (
        TORCHRUN | {"ACCELERATE_MIXED_PRECISION": "no"},
        World(5, 8, 1, 4, "node-a", 29500, "accelerate launch", 2),
    ),
    "torchrun in a Slurm job": (SRUN | TORCHRUN, World(5, 8, 1, 4, "node-a", 29500, "torchrun", 2)),
    "torchrun in a TrainJob": (
        TRAINJOB | TORCHRUN,
        World(5, 8, 1, 4, "node-a", 29500, "torchrun", 2),
    ),
    "srun": (SRUN, World(4, 6, 1, 3, "gnode10", PORT, "Slurm")),
    "srun, requeued": (
        SRUN | {"SLURM_RESTART_COUNT": "1"},
        World(4, 6, 1, 3, "gnode10", PORT, "Slurm", 1),
    ),
    "srun, another step": (SRUN | {"SLURM_STEP_ID": "3"}, World(4, 6, 1, 3, "gnode10", PORT + 3, "Slurm")),
    "srun, an address by the user": (
        SRUN | {"MASTER_ADDR": "ib-10", "MASTER_PORT": "4000"},
        World(4, 6, 1, 3, "ib-10", 4000, "Slurm"),
    ),
    "srun, unequal nodes": (
        SRUN | {"SLURM_STEP_TASKS_PER_NODE": "4,2", "SLURM_NODEID": "1", "SLURM_PROCID": "5"},
        World(5, 6, 1, 2, "gnode10", PORT, "Slurm"),
    ),
    "srun, one task and one GPU a node": (
        SRUN | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
                "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_GPUS_ON_NODE": "1"},
        World(1, 2, 0, 1, "gnode10", PORT, "Slurm"),
    ),
    "PyTorchJob, one process a pod": (
        PYTORCHJOB | {"PET_NPROC_PER_NODE": "1"},
        World(1, 2, 0, 1, "tune-master-0", 23456, "Kubernetes"),
    ),
    "PyTorchJob": (PYTORCHJOB, World(1, 2, 0, 1, "tune-master-0", 23456, "Kubernetes")),
}  # fmt: skip

NODES = {
    "TrainJob": (TRAINJOB, Node(12, 30, "tune-node-0-0.tune", 29400, "Kubernetes", 3)),
    "TrainJob, auto": (
        TRAINJOB | {"PET_NPROC_PER_NODE": "auto"},
        Node(12, 30, "tune-node-0-0.tune", 29400, "Kubernetes"),
    ),
    "PyTorchJob of several processes": (
        PYTORCHJOB | {"PET_NPROC_PER_NODE": "4", "WORLD_SIZE": "8"},
        Node(1, 2, "tune-master-0", 23456, "Kubernetes", 4),
    ),
    "srun, one task and several GPUs a node": (
        SRUN | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
                "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_GPUS_ON_NODE": "8"},
        Node(1, 2, "gnode10", PORT, "Slurm", 8),
    ),
    "SageMaker": (SAGEMAKER, Node(1, 2, "algo-1", 7777, "SageMaker", 8)),
    "SageMaker without GPUs": (
        SAGEMAKER | {"SM_NUM_GPUS": "0"},
        Node(1, 2, "algo-1", 7777, "SageMaker"),
    ),
    "SageMaker by its resources": (
        {"SM_RESOURCE_CONFIG": RESOURCES, "SM_NUM_GPUS": "1"},
        Node(0, 2, "algo-1", 7777, "SageMaker", 1),
    ),
}  # fmt: skip

ALONE = {
    "a shell": {"PATH": "/bin"},
    "a batch script": SBATCH,
    "a shell of salloc": SALLOC,
    "srun of one task": SALLOC | {"SLURM_STEP_ID": "1", "SLURM_GPUS_ON_NODE": "8"},
    "a pod": {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
    "a number of processes for a script of another": {"WORLD_SIZE": "4"},
}

MISTAKES = {
    "RANK": TORCHRUN | {"RANK": "8"},
    "RANK: 'one'": TORCHRUN | {"RANK": "one"},
    "RANK: -1": TORCHRUN | {"RANK": "-1"},
    "RANK is missing": {name: TORCHRUN[name] for name in TORCHRUN if name != "RANK"},
    "WORLD_SIZE is missing": {name: TORCHRUN[name] for name in TORCHRUN if name != "WORLD_SIZE"},
    "LOCAL_RANK": TORCHRUN | {"LOCAL_RANK": "4"},
    "LOCAL_WORLD_SIZE": TORCHRUN | {"LOCAL_WORLD_SIZE": "9"},
    "MASTER_ADDR": TORCHRUN | {"MASTER_ADDR": " "},
    "MASTER_PORT": TORCHRUN | {"MASTER_PORT": "70000"},
    "TORCHELASTIC_RESTART_COUNT": TORCHRUN | {"TORCHELASTIC_RESTART_COUNT": "x"},
    "SLURM_PROCID": SRUN | {"SLURM_PROCID": "6"},
    "SLURM_LOCALID": SRUN | {"SLURM_LOCALID": "3"},
    "SLURM_NODEID": SRUN | {"SLURM_NODEID": "2"},
    "SLURM_STEP_NODELIST": SRUN | {"SLURM_STEP_NODELIST": "gnode[10-"},
    "SLURM_STEP_TASKS_PER_NODE": SRUN | {"SLURM_STEP_TASKS_PER_NODE": "3(x"},
    "SLURM_JOB_ID is missing": {name: SRUN[name] for name in SRUN if name != "SLURM_JOB_ID"},
    "WORLD_SIZE: 4": SRUN | {"WORLD_SIZE": "4"},
    "PET_NODE_RANK": TRAINJOB | {"PET_NODE_RANK": "30"},
    "MASTER_ADDR is missing": {
        name: TRAINJOB[name] for name in TRAINJOB if name != "PET_MASTER_ADDR"
    },
    "PET_NNODES: 1:3": {"PET_NNODES": "1:3", "PET_RDZV_ENDPOINT": "localhost:1234"},
    "PET_NPROC_PER_NODE": TRAINJOB | {"PET_NPROC_PER_NODE": "many"},
    "SM_HOSTS": SAGEMAKER | {"SM_HOSTS": "algo-1"},
    "SM_HOSTS names no hosts": SAGEMAKER | {"SM_HOSTS": "[]"},
    "SM_RESOURCE_CONFIG": {"SM_CURRENT_HOST": "algo-1"},
    "SM_RESOURCE_CONFIG names no hosts": {"SM_RESOURCE_CONFIG": "[1]"},
    "SM_CURRENT_HOST: algo-3": SAGEMAKER | {"SM_CURRENT_HOST": "algo-3"},
}


@pytest.mark.parametrize("case", RANKS)
def test_a_rank_is_recognised(case: str) -> None:
    env, expected = RANKS[case]
    assert world_of(env) == expected
    assert node_of(env) is None


@pytest.mark.parametrize("case", NODES)
def test_a_node_is_recognised(case: str) -> None:
    env, expected = NODES[case]
    assert node_of(env) == expected
    assert world_of(env) is None


@pytest.mark.parametrize("case", ALONE)
def test_a_process_that_is_alone(case: str) -> None:
    assert world_of(ALONE[case]) is None
    assert node_of(ALONE[case]) is None


@pytest.mark.parametrize("named", MISTAKES)
def test_what_is_wrong_is_named(named: str) -> None:
    with pytest.raises(UserError) as raised:
        world_of(MISTAKES[named])
    assert str(raised.value).startswith(named)


def test_ranks_of_slurm_meet_as_those_of_torchrun_do() -> None:
    """What torch reads gives back the same rank, but for who started it."""
    world = World(4, 6, 1, 3, "gnode10", PORT, "Slurm")
    assert to_env(world) == {
        "RANK": "4", "WORLD_SIZE": "6", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "3",
        "MASTER_ADDR": "gnode10", "MASTER_PORT": str(PORT),
    }  # fmt: skip
    assert world_of(to_env(world)) == World(4, 6, 1, 3, "gnode10", PORT, "RANK and WORLD_SIZE")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("gpu[01-03,7],x5", ["gpu01", "gpu02", "gpu03", "gpu7", "x5"]),
        ("node9", ["node9"]),
        ("rack[1-2]n[08-09].hpc", ["rack1n08.hpc", "rack1n09.hpc", "rack2n08.hpc", "rack2n09.hpc"]),
        ("a[9-11]", ["a9", "a10", "a11"]),
    ],
)
def test_nodes_are_named_in_full(text: str, names: list[str]) -> None:
    assert nodes_of(text) == names


@pytest.mark.parametrize(
    "text", ["", "gpu[1-", "gpu[3-1]", "gpu[1-999999999]", "a,,b", "a b", "gpu[]"]
)
def test_no_list_of_nodes(text: str) -> None:
    with pytest.raises(UserError, match="SLURM_X: "):
        nodes_of(text, "SLURM_X")


def test_counts_on_each_node() -> None:
    assert counts_of("2(x3),1") == [2, 2, 2, 1]
