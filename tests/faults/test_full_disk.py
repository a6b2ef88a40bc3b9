"""A disk that is full at one place or another: one sentence, nothing corrupt, and with room again
the run goes on to the same end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
UNSHARE = ["unshare", "--map-root-user", "--mount"]


def in_own_mounts(*command: object) -> str:
    """What a command says that may mount what it likes, unseen by others."""
    done = subprocess.run(
        [*UNSHARE, sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def may_mount() -> bool:
    probe = [*UNSHARE, "mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", "/mnt"]
    try:
        return subprocess.run(probe, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


pytestmark = pytest.mark.skipif(
    not may_mount(),
    reason="a small disk needs a namespace of mounts (unshare), which is not allowed",
)


@pytest.mark.slow
@pytest.mark.parametrize(("disk", "sizes"), [("run", 24), ("cache", 8)])
def test_a_full_disk_at_any_write_loses_nothing(tiny_folder: Path, disk: str, sizes: int) -> None:
    command = (HERE / "full_disk.py", "--sizes", sizes, "--model", tiny_folder, "--only", disk)
    figures = json.loads(in_own_mounts(*command))
    assert figures["points"] == figures["resumed"] == sizes
    assert figures["failed"] >= sizes // 2, figures


def test_a_read_only_place_is_refused_in_one_sentence(tiny_folder: Path, tmp_path: Path) -> None:
    said = in_own_mounts(HERE / "read_only.py", tiny_folder, tmp_path)
    assert json.loads(said) == {
        "output_dir": 2, "cache": 1, "sentences": 2, "output_said": True, "cache_said": True
    }  # fmt: skip
