"""Who started this process, read from its environment: one rank of several, a node that starts
ranks of its own, or neither.

Pure: an environment is a mapping of names to texts. A process is at most one of the two, so
`world_of` is None wherever `node_of` is not. Where the names come from:
- torchrun, and `accelerate launch`, which starts through it: torch.distributed.run,
  "Environment Variables".
- Slurm: srun(1), "OUTPUT ENVIRONMENT VARIABLES". Those of the step count: sbatch and salloc set
  SLURM_PROCID and SLURM_NTASKS too, for a shell that is no task.
- Kubernetes: Kubeflow Trainer sets PET_*, which torchrun reads; its forerunner's PyTorchJob sets
  RANK and WORLD_SIZE for each pod besides (kubeflow/trainer, plugins/torch; training-operator,
  controller.v1/pytorch/envvar.go).
- SageMaker: aws/sagemaker-training-toolkit, ENVIRONMENT_VARIABLES.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llamaweft.errors import UserError
from llamaweft.parallel.nodelist import counts_of, nodes_of

Environment = Mapping[str, str]

SAGEMAKER_PORT = 7777
"""The port that SageMaker's own launchers use."""

SLURM_PORTS = range(20_000, 30_000)
"""Below those that Linux gives to outgoing connections (32768 and up). A job takes one by its
number, so that two of them on a node rarely meet."""


@dataclass(frozen=True)
class World:
    """A process that is one rank. rank of world, local_rank of local_world on its node; address
    and port: where rank 0 is met; restarts: how often its launcher has started it anew."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    address: str
    port: int
    started_by: str
    restarts: int = 0


@dataclass(frozen=True)
class Node:
    """A process that is alone on its node and starts ranks there. index of count nodes; address
    and port: where the first node is met; processes: ranks to start, where the platform says."""

    index: int
    count: int
    address: str
    port: int
    started_by: str
    processes: int | None = None


def world_of(env: Environment) -> World | None:
    """The rank that this process is; None for a process that is not one of several.

    Raises UserError, which names the variable, for what is missing, no number or out of range.
    """
    if node_of(env) is not None:
        return None
    if "RANK" in env:
        return _torch_rank(env)
    if _is_task(env):
        return _slurm_task(env)
    if "WORLD_SIZE" in env and "LOCAL_RANK" in env:
        _text(env, "RANK")
    return None


def node_of(env: Environment) -> Node | None:
    """The node that this process is alone on; None for a rank, and for a process that nobody
    told of others. Raises UserError as `world_of`."""
    if "LOCAL_RANK" in env:
        return None
    if "RANK" in env:
        return _pod(env) if _starts_several(env) else None
    if "PET_NODE_RANK" in env or "PET_RDZV_ENDPOINT" in env:
        return _pod(env)
    if _is_task(env):
        return _slurm_node(env)
    if "SM_CURRENT_HOST" in env or "SM_RESOURCE_CONFIG" in env:
        return _sagemaker_host(env)
    return None


def to_env(world: World) -> dict[str, str]:
    """The variables that torch.distributed's `env://` reads."""
    return {
        "RANK": str(world.rank),
        "WORLD_SIZE": str(world.world),
        "LOCAL_RANK": str(world.local_rank),
        "LOCAL_WORLD_SIZE": str(world.local_world),
        "MASTER_ADDR": world.address,
        "MASTER_PORT": str(world.port),
    }


def _torch_rank(env: Environment) -> World:
    """RANK and what belongs to it. A pod's has no LOCAL_RANK: it is alone there."""
    size = _number(env, "WORLD_SIZE", 1)
    local = (0, 1)
    if "LOCAL_RANK" in env:
        count = _number(env, "LOCAL_WORLD_SIZE", 1, size)
        local = (_number(env, "LOCAL_RANK", 0, count - 1), count)
    return World(
        _number(env, "RANK", 0, size - 1),
        size,
        *local,
        _text(env, "MASTER_ADDR"),
        _port(env, "MASTER_PORT"),
        _launcher(env),
        _number(env, "TORCHELASTIC_RESTART_COUNT", 0, default=0),
    )


def _launcher(env: Environment) -> str:
    if any(name.startswith("ACCELERATE_") for name in env):
        return "accelerate launch"
    if "TORCHELASTIC_RUN_ID" in env:
        return "torchrun"
    return "Kubernetes" if "KUBERNETES_SERVICE_HOST" in env else "RANK and WORLD_SIZE"


def _starts_several(env: Environment) -> bool:
    """Whether a PyTorchJob's pod is meant to start several ranks: WORLD_SIZE counts them all then,
    and RANK the pods."""
    asked = env.get("PET_NPROC_PER_NODE", "1")
    return asked.isdecimal() and int(asked) > 1


def _pod(env: Environment) -> Node:
    if ":" in env.get("PET_NNODES", "") or "PET_NODE_RANK" not in env:
        raise UserError(
            f"PET_NNODES: {env.get('PET_NNODES')}, and the nodes meet at PET_RDZV_ENDPOINT, which "
            "torchrun alone reads; start it as `torchrun -m llamaweft train ...`"
        )
    count = _number(env, "PET_NNODES", 1)
    own = "PET_" if "PET_MASTER_ADDR" in env else ""
    asked = env.get("PET_NPROC_PER_NODE", "auto")
    return Node(
        _number(env, "PET_NODE_RANK", 0, count - 1),
        count,
        _text(env, f"{own}MASTER_ADDR"),
        _port(env, f"{own}MASTER_PORT"),
        "Kubernetes",
        _number(env, "PET_NPROC_PER_NODE", 1) if asked not in ("auto", "cpu", "gpu") else None,
    )


def _is_task(env: Environment) -> bool:
    """Whether srun started this process as one of several tasks."""
    return "SLURM_STEP_NUM_TASKS" in env and _number(env, "SLURM_STEP_NUM_TASKS", 1) > 1


def _slurm_node(env: Environment) -> Node | None:
    """One task a node, with several GPUs for it."""
    gpus = _number(env, "SLURM_GPUS_ON_NODE", 0, default=0)
    count = _number(env, "SLURM_STEP_NUM_NODES", 1)
    if gpus < 2 or count != _number(env, "SLURM_STEP_NUM_TASKS", 1):
        return None
    index = _number(env, "SLURM_PROCID", 0, count - 1)
    return Node(index, count, _slurm_address(env), _slurm_port(env), "Slurm", gpus)


def _slurm_task(env: Environment) -> World:
    size = _number(env, "SLURM_STEP_NUM_TASKS", 1)
    if "WORLD_SIZE" in env and _number(env, "WORLD_SIZE", 1) != size:
        raise UserError(
            f"WORLD_SIZE: {env['WORLD_SIZE']}, and srun started SLURM_STEP_NUM_TASKS: {size}; "
            "remove WORLD_SIZE from the script"
        )
    tasks = counts_of(_text(env, "SLURM_STEP_TASKS_PER_NODE"), "SLURM_STEP_TASKS_PER_NODE")
    here = tasks[_number(env, "SLURM_NODEID", 0, len(tasks) - 1)]
    return World(
        _number(env, "SLURM_PROCID", 0, size - 1),
        size,
        _number(env, "SLURM_LOCALID", 0, here - 1),
        here,
        _slurm_address(env),
        _slurm_port(env),
        "Slurm",
        _number(env, "SLURM_RESTART_COUNT", 0, default=0),
    )


def _slurm_address(env: Environment) -> str:
    """The step's first node, on which task 0 runs."""
    if "MASTER_ADDR" in env:
        return _text(env, "MASTER_ADDR")
    name = "SLURM_STEP_NODELIST" if "SLURM_STEP_NODELIST" in env else "SLURM_JOB_NODELIST"
    return nodes_of(_text(env, name), name)[0]


def _slurm_port(env: Environment) -> int:
    if "MASTER_PORT" in env:
        return _port(env, "MASTER_PORT")
    number = _number(env, "SLURM_JOB_ID", 0) + _number(env, "SLURM_STEP_ID", 0, default=0)
    return SLURM_PORTS[number % len(SLURM_PORTS)]


def _sagemaker_host(env: Environment) -> Node:
    name = "SM_HOSTS" if "SM_HOSTS" in env else "SM_RESOURCE_CONFIG"
    hosts, current = _json(env, name), env.get("SM_CURRENT_HOST")
    if name == "SM_RESOURCE_CONFIG" and isinstance(hosts, dict):
        current = current or hosts.get("current_host")
        hosts = hosts.get("hosts")
    if not isinstance(hosts, list) or not hosts or not all(isinstance(h, str) for h in hosts):
        raise UserError(f'{name} names no hosts; it is a list such as ["algo-1", "algo-2"]')
    ordered = sorted(hosts)  # alike on every host, whatever order it was told
    if current not in ordered:
        raise UserError(f"SM_CURRENT_HOST: {current} is none of {name}: {', '.join(ordered)}")
    gpus = _number(env, "SM_NUM_GPUS", 0, default=0)
    index = ordered.index(current)
    return Node(index, len(ordered), ordered[0], SAGEMAKER_PORT, "SageMaker", gpus or None)


def _json(env: Environment, name: str) -> Any:
    try:
        return json.loads(_text(env, name))
    except ValueError:
        raise UserError(f"{name}: {env[name]!r} is not JSON, as its platform writes it") from None


def _text(env: Environment, name: str) -> str:
    if not (value := env.get(name, "").strip()):
        raise UserError(f"{name} is missing beside the other variables of its launcher; set it")
    return value


def _port(env: Environment, name: str) -> int:
    return _number(env, name, 1, 65_535)


def _number(
    env: Environment, name: str, least: int, most: int | None = None, default: int | None = None
) -> int:
    if default is not None and name not in env:
        return default
    text = _text(env, name)
    try:
        value = int(text)
    except ValueError:
        raise UserError(f"{name}: {text!r} is no whole number") from None
    if value < least or (most is not None and value > most):
        bounds = f"at least {least}" if most is None else f"{least} to {most}"
        raise UserError(f"{name}: {value} is out of range; it is {bounds} here")
    return value
