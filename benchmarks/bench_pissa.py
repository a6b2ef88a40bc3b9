"""What it costs to start PiSSA from a matrix: exactly, and by subspace iterations.

    python -m benchmarks.bench_pissa 1536x576 4096x4096 [--rank 16]

Seconds and the peak of anonymous memory beside the matrix itself, of random matrices. `found` is
the norm of the rest W - s B0 A0 over that of the exact rest, so 1 is the best; a random matrix has
no large singular values, so it is a hard case.
"""

from __future__ import annotations

import argparse
import threading
import time

import torch

from llamaweft.adapters.pissa import principal
from llamaweft.runtime import anon_bytes

STARTS = ("pissa", "pissa_niter_4", "pissa_niter_16")


class Peak:
    """The most anonymous memory that was held while it ran, beyond what was held before."""

    def __enter__(self) -> Peak:
        self.before, self.bytes, self._over = anon_bytes(), 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.002):
            self.bytes = max(self.bytes, anon_bytes() - self.before)


def measure(outputs: int, inputs: int, rank: int) -> None:
    torch.manual_seed(0)
    w_OI = torch.randn(outputs, inputs)
    least = None
    for start in STARTS:
        began = time.perf_counter()
        with Peak() as peak:
            a_RI, b_OR = principal(w_OI, rank, start, 1.0)
        seconds = time.perf_counter() - began
        rest = float((w_OI - b_OR @ a_RI).norm())
        least = least or rest
        print(
            f"{outputs}x{inputs} {start}: {seconds:.2f} s, {peak.bytes / 2**20:.0f} MiB, "
            f"found {rest / least:.5f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shapes", nargs="+")
    parser.add_argument("--rank", type=int, default=16)
    arguments = parser.parse_args()
    print(f"{torch.get_num_threads()} threads")
    torch.linalg.svd(torch.randn(8, 8))
    for shape in arguments.shapes:
        outputs, inputs = (int(size) for size in shape.split("x"))
        measure(outputs, inputs, arguments.rank)


if __name__ == "__main__":
    main()
