"""What the machine can do, measured: free memory, its matmul rate, its elementwise traffic."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import torch
from torch import Tensor


def available_bytes(device: torch.device) -> int:
    """Memory that a process could still take: of the device, or of the machine (within the
    control group's limit where there is one)."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = int(psutil.virtual_memory().available)
    return min([free, *_group_room()])


CGROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")


def _group_room() -> Iterator[int]:
    """What the control groups of this process (version 1 and 2) still allow: each limit less the
    anonymous memory below it, since page cache is given up when memory is short."""
    try:
        lines = OWN_GROUPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, limit, held = CGROUPS, "memory.max", "anon"
        elif "memory" in controllers.split(","):
            root, limit, held = CGROUPS / "memory", "memory.limit_in_bytes", "total_rss"
        else:
            continue
        folder = root / path.lstrip("/")
        for group in [folder, *folder.parents]:
            try:
                most = int((group / limit).read_text())  # ValueError for "max"
                stat = dict(x.split() for x in (group / "memory.stat").read_text().splitlines())
                yield most - int(stat[held])
            except (OSError, ValueError, KeyError):
                pass
            if group == root:
                break


def matmul_flops_per_second(
    device: torch.device,
    dtype: torch.dtype,
    size: tuple[int, int, int] = (1024, 1024, 1024),
    seconds: float = 0.5,
    multiply: Callable[[Tensor, Tensor], Tensor] = torch.mm,
) -> float:
    """The rate of [m, k] x [k, n] products on this device, measured for about `seconds`."""
    m, k, n = size
    a = torch.randn(m, k, device=device, dtype=dtype)
    b = torch.randn(n, k, device=device, dtype=dtype)
    rates: list[float] = []
    end = time.perf_counter() + seconds
    while not rates or time.perf_counter() < end:
        began = time.perf_counter()
        for _ in range(4):
            multiply(a, b.t())
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        rates.append(4 * 2.0 * m * k * n / (time.perf_counter() - began))
    return sorted(rates)[len(rates) // 2]


TRAFFIC_NUMBERS = 2**24
"""More than a cache holds, so that each result is new memory, as it is in a step."""


def traffic_bytes_per_second(device: torch.device, seconds: float = 0.3) -> float:
    """Bytes read and written a second by elementwise work on large fp32 tensors."""
    a, b = (torch.randn(TRAFFIC_NUMBERS, device=device) for _ in range(2))
    rates: list[float] = []
    end = time.perf_counter() + seconds
    while not rates or time.perf_counter() < end:
        began = time.perf_counter()
        torch.mul(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        rates.append(3 * a.nbytes / (time.perf_counter() - began))
    return sorted(rates)[len(rates) // 2]
