"""The parent's side: a contender's process, driven step by step, its memory read from outside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.memory_limit import Group
from llamaweft.errors import RunError

ROOT = Path(__file__).parents[1]
SAMPLE_SECONDS = 0.01
PATIENCE_SECONDS = 20
LOG_LINES = 15

KEPT_MEMORY = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=17179869184"
    ":glibc.malloc.trim_threshold=17179869184"
}
"""Environment in which glibc keeps freed memory instead of giving it back and faulting it in
again, and takes it in huge pages: a well-known setting for training on a CPU."""


@dataclass(frozen=True)
class Entry:
    """A contender: its name, its module and what the module is given.

    environment: added to the process's own. group: limits its memory.
    """

    name: str
    module: str
    settings: dict[str, Any]
    environment: dict[str, str]
    group: Group | None = None


class Contender:
    """The running process. Loading and the first step are over once it is made.

    Raises RunError, with the end of its log, when the process dies.
    """

    def __init__(self, entry: Entry, logs: Path) -> None:
        self.entry = entry
        self.log = logs / f"{entry.name.replace(' ', '-')}.log"
        self.steps: list[dict[str, Any]] = []
        logs.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", entry.module, json.dumps(entry.settings)]
        if entry.group:  # the shell joins the group and becomes the contender
            join = 'echo $$ > "$0" && exec "$@"'
            command = ["sh", "-c", join, str(entry.group.join), *command]
        quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        with self.log.open("w", encoding="utf-8") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=ROOT,
                env=os.environ | quiet | entry.environment,
            )
        began = time.perf_counter()
        self.ready = self._answer()
        self.ready["load_and_warm_up_seconds"] = time.perf_counter() - began

    def step(self) -> dict[str, Any]:
        """One optimizer step; its figures are kept in `steps` too."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("go\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._died() from None
        answer = self._answer()
        self.steps.append(answer)
        return answer

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        with Peak(self._process.pid) as peak:
            line = self._process.stdout.readline()
        if not line:
            raise self._died()
        return json.loads(line) | {
            "peak_anon_bytes": peak.anon_bytes,
            "peak_rss_bytes": peak.rss_bytes,
        }

    def _died(self) -> RunError:
        code = self._process.wait()
        last = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
        return RunError(f"{self.entry.name} ended with exit code {code}:\n" + "\n".join(last))

    def close(self) -> None:
        """Tell it to stop; end it when it does not."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def __enter__(self) -> Contender:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Peak:
    """The peaks of a process's memory while the block runs, sampled from a thread of ours: a
    thread of its own would wait for its interpreter and miss the highest moment."""

    def __init__(self, pid: int) -> None:
        self._status = Path(f"/proc/{pid}/status")
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self.anon_bytes = self.rss_bytes = 0

    def _sample(self) -> None:
        while not self._over.wait(SAMPLE_SECONDS):
            try:
                lines = self._status.read_text().splitlines()
            except OSError:
                return
            values = dict(line.split(":", 1) for line in lines)
            if "RssAnon" in values:
                self.anon_bytes = max(self.anon_bytes, _bytes(values["RssAnon"]))
                self.rss_bytes = max(self.rss_bytes, _bytes(values["VmRSS"]))

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def train_watched(recipe: Path, *arguments: str) -> Peak:
    """The peaks of `llamaweft train` from start to end. Raises RunError, with the last line that
    it said, when it fails."""
    process = subprocess.Popen(
        [sys.executable, "-m", "llamaweft", "train", str(recipe), *arguments],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    with Peak(process.pid) as peak:
        _, said = process.communicate()
    if process.returncode:
        raise RunError(said.strip().splitlines()[-1])
    return peak


def _bytes(value: str) -> int:
    return int(value.split()[0]) * 1024
