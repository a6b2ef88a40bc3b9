"""What the process runs on: device, compute dtype and why, threads, seeds, memory.

Chosen once, at the start, with a reason that is printed and saved.
"""

from __future__ import annotations

import ctypes
import os
import platform
import random
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Generic, TypeVar

import numba
import numpy as np
import psutil
import torch
from llvmlite import binding

from llamaweft import __version__
from llamaweft.errors import UserError

Item = TypeVar("Item")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""What weights are held and written in."""

COMPUTE_DTYPES = DTYPES | {"fp16": torch.float16}
"""What activations and products are computed in. No weight is held in fp16: bf16 takes as many
bytes and holds every number of a model that was trained in bf16."""


def cache_dir() -> Path:
    """Where converted models and prepared data are kept: `$LLAMAWEFT_CACHE`,
    else `$XDG_CACHE_HOME/llamaweft`, else `~/.cache/llamaweft`."""
    if override := os.environ.get("LLAMAWEFT_CACHE"):
        return Path(override)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "llamaweft"


@dataclass(frozen=True)
class Runtime:
    """The device that computes, in which dtype, and the reason for it."""

    device: torch.device
    compute_dtype: torch.dtype
    reason: str
    threads: int

    @property
    def compute_dtype_name(self) -> str:
        return next(name for name, dtype in COMPUTE_DTYPES.items() if dtype == self.compute_dtype)


@dataclass(frozen=True)
class Share(Generic[Item]):
    """Which items of a work this process does, of several that share it. gather: what one has ->
    what each has."""

    index: int = 0
    count: int = 1
    gather: Callable[[list[Item]], list[list[Item]]] = lambda mine: [mine]

    def of(self, items: Sequence[Any]) -> list[Any]:
        """Those of this process."""
        return list(items[self.index :: self.count])

    def joined(self, mine: list[Item]) -> list[Item]:
        """What all processes made of theirs, in the order of the items."""
        made = self.gather(mine)
        return [made[i % self.count][i // self.count] for i in range(sum(map(len, made)))]


ALL_OF_IT: Share[Any] = Share()


def choose_runtime(
    device: str = "auto", compute_dtype: str = "auto", local_rank: int | None = None
) -> Runtime:
    """Pick the device and the dtype that its multipliers are fast in.

    `device`: auto, cpu, cuda or cuda:N. `compute_dtype`: auto, fp32, bf16 or fp16. local_rank: of
    this process among several on the machine, each of which takes a GPU of its own.
    Raises UserError for a device that is not there.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and local_rank is not None:
        device = f"cuda:{local_rank}"
    chosen = torch.device(device)
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"training.device: {device} is not there; torch sees {torch.cuda.device_count()} CUDA "
            "devices"
        )
    if compute_dtype == "auto":
        dtype, reason = _fast_dtype(chosen)
    else:
        dtype, reason = COMPUTE_DTYPES[compute_dtype], "asked for by the recipe"
    return Runtime(chosen, dtype, reason, torch.get_num_threads())


def _fast_dtype(device: torch.device) -> tuple[torch.dtype, str]:
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) >= (8, 0):
            return torch.bfloat16, "this GPU multiplies bf16 at full rate"
        return torch.float16, "this GPU multiplies fp16 at full rate (gradients are scaled)"
    if cpu_has_bf16():
        return torch.bfloat16, "this CPU has bf16 units (AVX512-BF16, AMX or ARM BF16)"
    return torch.float32, "this CPU has no bf16 units"


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 in hardware. Without it bf16 is emulated, far slower
    than fp32. Read from /proc/cpuinfo; False where that cannot be read."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})


def mkl_is_held_back() -> bool:
    """Whether MKL leaves out the AVX-512 that this CPU has, and torch brings oneDNN, which does
    not: so on AMD's. There fp32 is multiplied by oneDNN (weights/matmul.py)."""
    amd = binding.get_host_cpu_name().startswith("znver")
    wide = bool(binding.get_host_cpu_features().get("avx512f", False))
    known = hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return amd and wide and known and torch.backends.mkldnn.is_available()


def share_cores(processes: int) -> None:
    """Compute with a part of the threads, as one of so many processes on this machine does."""
    threads = max(1, torch.get_num_threads() // processes)
    numba.set_num_threads(min(threads, numba.get_num_threads()))
    torch.set_num_threads(threads)  # after numba, which sets OpenMP's as it starts its own


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators (every device)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


LARGE_BYTES = 2**20
KEPT_FREE_BYTES = 64 * 2**20
ALL_BYTES = 2**30
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def return_freed_memory() -> bool:
    """Have the C library give tensors of LARGE_BYTES and more back to the system as soon as they
    are freed, and keep at most KEPT_FREE_BYTES of the rest.

    By itself glibc raises the limit to 32 MiB once such a tensor was freed, and then holds on to
    fragments (decision 0005). Each such tensor is faulted in anew, so this is for models whose
    tensors are large and whose memory is short. Returns whether there is a glibc to tell.
    """
    return _tell_malloc(LARGE_BYTES, KEPT_FREE_BYTES)


def keep_freed_memory() -> bool:
    """Have the C library keep what is freed, up to ALL_BYTES a tensor, so that the next step does
    not fault it in again; for models whose tensors are large, where memory is not short (decision
    0017). Returns whether there is a glibc to tell."""
    return _tell_malloc(ALL_BYTES, 2 * ALL_BYTES - 1)


def _tell_malloc(mapped_from_bytes: int, kept_bytes: int) -> bool:
    """Tensors of so many bytes are mapped one by one; so much freed memory is kept."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        told = libc.mallopt(_M_MMAP_THRESHOLD, mapped_from_bytes)
        return bool(told and libc.mallopt(_M_TRIM_THRESHOLD, kept_bytes))
    except (OSError, AttributeError):
        return False


def trim_freed_memory() -> None:
    """Have glibc give back what it holds of freed memory; nothing where there is no glibc."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return


def rss_bytes() -> int:
    """Resident memory of this process, page cache of mapped files included."""
    return int(psutil.Process().memory_info().rss)


def anon_bytes() -> int:
    """Resident anonymous memory of this process: what it truly needs, without mapped files.
    Linux: RssAnon; elsewhere the resident size."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return rss_bytes()


def device_bytes(device: torch.device) -> int:
    """Peak memory allocated on the accelerator since the last call; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    peak = int(torch.cuda.max_memory_allocated(device))
    torch.cuda.reset_peak_memory_stats(device)
    return peak


def environment(runtime: Runtime) -> dict[str, object]:
    """What is needed to rebuild a run: versions, hardware, commit, and what was decided."""
    packages = (
        "torch",
        "transformers",
        "accelerate",
        "safetensors",
        "tokenizers",
        "numpy",
        "bitsandbytes",
    )
    return {
        "llamaweft": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        **{name: _version(name) for name in packages},
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "device": _device_name(runtime.device),
        "threads": runtime.threads,
        "compute_dtype": runtime.compute_dtype_name,
        "compute_dtype_reason": runtime.reason,
        "fp32_products": "oneDNN, since MKL leaves out AVX-512 on AMD's CPUs"
        if mkl_is_held_back()
        else "torch.mm",
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """The commit of the source tree that this package lies in; empty outside one."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return ""
    try:
        command = ["git", "-C", str(root), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({torch.backends.cpu.get_cpu_capability()})"
