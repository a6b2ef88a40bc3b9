"""Starting several processes that train, and comparing what they leave with one process's run."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from llamaweft.train.metrics import read_metrics

HERE = Path(__file__).parent
LIMIT_SECONDS = 300


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def rank_env(rank: int, world: int, port: int) -> dict[str, str]:
    """What torch's env:// wants, one thread each."""
    return os.environ | {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "NUMBA_NUM_THREADS": "1",
    }


def run_cases(world: int, cases: list[dict], folder: Path) -> None:
    """Train all cases in one process group of `world` ranks."""
    path, port = folder / f"cases-{world}.json", free_port()
    path.write_text(json.dumps(cases))
    ranks = [
        subprocess.Popen(
            [sys.executable, str(HERE / "rank_cases.py"), str(path)],
            env=rank_env(rank, world, port),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        ends = [rank.communicate(timeout=LIMIT_SECONDS)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    failed = [f"rank {n}:\n{said}" for n, said in enumerate(ends) if ranks[n].returncode]
    assert not failed, "\n".join(failed)


def losses(run: Path, kind: str = "train") -> list[float]:
    return [
        record["loss"] for record in read_metrics(run / "metrics.jsonl") if record["kind"] == kind
    ]


def trained(run: Path) -> dict[str, torch.Tensor]:
    """What the newest checkpoint holds of every trained weight, whole."""
    from llamaweft.parallel.parts import outlines, read_parts

    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    held = load_file(newest / "trained.safetensors")
    parts = {n: torch.zeros_like(t, device="cpu") for n, t in outlines(newest / "trained").items()}
    if parts:
        read_parts(newest / "trained", parts)
    return held | parts


def furthest(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> tuple[float, str]:
    """The largest ||a - b|| / ||b|| of all tensors, and which it is."""
    assert found.keys() == wanted.keys()
    return max(
        (float((found[name] - of).norm() / of.norm().clamp(min=1e-12)), name)
        for name, of in wanted.items()
    )
