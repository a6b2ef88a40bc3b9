"""Damages files that come from elsewhere and opens them: recipes, checkpoints, models, adapters, rows.
Each ends in what it holds or in one sentence, in little time and memory.

    python tests/faults/fuzz_files.py --seconds 60 --seed 0     (Linux)

Checkpoints are damaged with and without their checksums made right again, so that what lies behind
these is tried too. Every case is tried in a process of its own, so that one that crashes or hangs
is counted; it is made from the seed, the target and its number alone: --only recipe --case 17 tries
it again. Ends with 1 when a case ended in any other way. Rows have a fuzzer of their own that tries
more kinds: fuzz_readers.py.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from multiprocessing.connection import Connection
from pathlib import Path

from fuzz_readers import memory_mib
from fuzz_targets import TARGETS, Target

from llamaweft.errors import RunError, UserError

SECONDS_ALLOWED = 20.0
MIB_ALLOWED = 400
"""What a case may add to the process."""


def tried(target: Target, seed: int, case: int) -> str:
    """How a case ended: accepted, refused, or FAILED with the reason."""
    try:
        target.attempt(random.Random(f"{seed}/{target.name}/{case}"))
        return "accepted"
    except (UserError, RunError) as error:
        lines = str(error).splitlines()
        if target.one_line and len(lines) != 1:
            return f"FAILED: {len(lines)} lines: {error}"
        return "refused"
    except BaseException as error:  # a panic of a library in Rust is no Exception
        last = traceback.extract_tb(error.__traceback__)[-1]
        return f"FAILED: {type(error).__name__}: {str(error)[:200]} ({last.filename}:{last.lineno})"


def trier(pipe: Connection, names: list[str], folder: str) -> None:
    """Tries what it is told to; answers how that ended and how many MiB it added at most."""
    os.environ["LLAMAWEFT_CACHE"] = f"{folder}/cache"
    targets = {kind.name: kind(Path(folder)) for kind in TARGETS if kind.name in names}
    for target in targets.values():
        target.check_valid()
    pipe.send("ready")
    for name, seed, case in iter(pipe.recv, None):
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before = memory_mib("VmRSS")
        ended = tried(targets[name], seed, case)
        pipe.send((ended, memory_mib("VmHWM") - before))


class Trying:
    """The process that tries, begun anew after a crash or a hang."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.begin()

    def begin(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.pipe, theirs = multiprocessing.Pipe()
        arguments = (theirs, self.names, self.folder.name)
        self.process = multiprocessing.get_context("spawn").Process(target=trier, args=arguments)
        self.process.start()
        theirs.close()
        self.pipe.recv()

    def attempt(self, name: str, seed: int, case: int) -> tuple[str, int]:
        """How it ended, and MiB added to the process."""
        self.pipe.send((name, seed, case))
        try:
            if self.pipe.poll(SECONDS_ALLOWED):
                return self.pipe.recv()
            ended = f"FAILED: no end in {SECONDS_ALLOWED:.0f} s"
        except (EOFError, ConnectionError):
            self.process.join()
            ended = f"FAILED: the process died ({self.process.exitcode})"
        self.end(kill=True)
        self.begin()
        return ended, 0

    def end(self, kill: bool = False) -> None:
        if kill:
            self.process.kill()
        else:
            self.pipe.send(None)
        self.process.join()
        self.folder.cleanup()


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--seconds", type=float, default=60)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--only", choices=[kind.name for kind in TARGETS], action="append")
    options.add_argument("--case", type=int, help="one case of --only alone")
    asked = options.parse_args()
    names = asked.only or [kind.name for kind in TARGETS]
    trying = Trying(names)
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    slowest: dict[str, float] = defaultdict(float)
    most: dict[str, int] = defaultdict(int)
    if asked.case is not None:
        print(trying.attempt(names[0], asked.seed, asked.case))
        trying.end()
        return 0
    until, case = time.monotonic() + asked.seconds, 0
    while time.monotonic() < until:
        for name in names:
            began = time.monotonic()
            ended, mib = trying.attempt(name, asked.seed, case)
            slowest[name] = max(slowest[name], time.monotonic() - began)
            most[name] = max(most[name], mib)
            if mib > MIB_ALLOWED:
                ended = f"FAILED: {mib} MiB"
            if ended.startswith("FAILED"):
                print(f"{name} case {case}: {ended}", flush=True)
            counts[name]["FAILED" if ended.startswith("FAILED") else ended] += 1
        case += 1
    trying.end()
    for name in names:
        ways = ", ".join(f"{count} {way}" for way, count in sorted(counts[name].items()))
        print(f"{name:14} {ways}; slowest {slowest[name]:.2f} s, most memory {most[name]} MiB")
    failed = sum(counts[name]["FAILED"] for name in names)
    print(f"seed {asked.seed}: {sum(map(Counter.total, counts.values()))} inputs, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
