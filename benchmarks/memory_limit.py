"""A hard memory limit around one process: a control group of version 1 or 2.

The page cache that the process fills counts too, so cached files are dropped from memory first:
pages that are there already are charged to nobody inside the group.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from llamaweft.errors import UserError

V1 = Path("/sys/fs/cgroup/memory")
V2 = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Group:
    """A control group. `join` is what a process writes its id to."""

    folder: Path
    version: int

    @property
    def join(self) -> Path:
        return self.folder / "cgroup.procs"

    def usage(self) -> dict[str, int]:
        """Peak bytes with page cache, and how often the limit was met."""
        if self.version == 1:
            return {
                "peak_bytes": _number(self.folder / "memory.max_usage_in_bytes"),
                "limit_met": _number(self.folder / "memory.failcnt"),
            }
        events = dict(
            line.split() for line in (self.folder / "memory.events").read_text().splitlines()
        )
        peak = self.folder / "memory.peak"
        return {
            "peak_bytes": _number(peak) if peak.exists() else 0,
            "limit_met": int(events["max"]),
        }


@contextmanager
def memory_limit(limit_bytes: int) -> Iterator[Group]:
    """A group with this limit and no swap; removed afterwards.

    Raises UserError where groups cannot be made (not Linux, or no right to).
    """
    version = 1 if (V1 / "memory.limit_in_bytes").exists() else 2
    folder = (V1 if version == 1 else V2) / f"llamaweft-bench-{os.getpid()}"
    try:
        if version == 2:
            (V2 / "cgroup.subtree_control").write_text("+memory")
        folder.mkdir()
        name = "memory.limit_in_bytes" if version == 1 else "memory.max"
        (folder / name).write_text(str(limit_bytes))
        swap = folder / ("memory.memsw.limit_in_bytes" if version == 1 else "memory.swap.max")
        if swap.exists():
            swap.write_text(str(limit_bytes if version == 1 else 0))
    except OSError as error:
        with suppress(OSError):
            folder.rmdir()
        raise UserError(
            f"--cgroup: no memory group can be made in {folder.parent} ({error.strerror}); "
            "run as root on Linux, or leave --cgroup out"
        ) from None
    try:
        yield Group(folder, version)
    finally:
        for _ in range(50):  # a group goes once its last process is gone
            try:
                folder.rmdir()
                break
            except OSError:
                time.sleep(0.1)


def drop_cached(folder: Path) -> None:
    """Drop the pages of the files below `folder` from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)  # a dirty page stays
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def _number(path: Path) -> int:
    return int(path.read_text())
