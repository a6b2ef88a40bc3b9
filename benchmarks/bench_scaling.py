"""Weak and strong scaling on one and two processes, each on a core of its own.

    python -m benchmarks.bench_scaling                              five minutes

LoRA on fp32 of the embedded model with an even number of heads (models.py). Strong: a step of
`--packs` packs on one process, and on two as data, shard and tensor ranks. Weak: half as many on
one. The machine's own limit: two processes at once that know nothing of each other, half of the
packs each.

All contenders are alive, and take their steps in turn, a step each in a round. A step's seconds are
those that rank 0 writes to metrics.jsonl; the first is a warm-up.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import data, models, report
from benchmarks.contender import PATIENCE_SECONDS, ROOT, Contender, Entry
from llamaweft.errors import RunError, UserError
from llamaweft.model.tokenizer import load_tokenizer
from llamaweft.parallel.layout import DIMENSIONS, Layout
from llamaweft.runtime import cache_dir

ONE = Layout()
ONE_THREAD = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
MEMORY_BUDGET = "2GiB"
"""Of each process, so that all keep and recompute the same."""


@dataclass(frozen=True)
class Case:
    """A contender: `runs` runs at once, each of the processes of its layout. packs: in a step of
    one run."""

    name: str
    packs: int
    layout: Layout = ONE
    runs: int = 1

    @property
    def cores(self) -> int:
        return self.runs * self.layout.world


def cases(packs: int) -> list[Case]:
    """Strong and weak; two data ranks are both."""
    return [
        Case(f"1 process, {packs} packs", packs),
        Case(f"1 process, {packs // 2} packs", packs // 2),
        Case(f"2 processes apart, {packs // 2} packs each", packs // 2, runs=2),
        *(Case(f"{name} 2, {packs} packs", packs, Layout(**{name: 2})) for name in DIMENSIONS),
    ]


class Running:
    """A case's processes; `step` has each of its runs take one."""

    def __init__(self, runs: list[Contender], folders: list[Path]) -> None:
        self.runs, self.folders = runs, folders

    def step(self) -> None:
        with ThreadPoolExecutor(len(self.runs)) as at_once:
            list(at_once.map(Contender.step, self.runs))

    def steps(self) -> list[tuple[float, float]]:
        """(computed tokens, seconds) of each measured step: the sum and the longest of its runs."""
        each = [_written(folder) for folder in self.folders]
        return [
            (sum(one["computed_tokens"] for one in step), max(one["seconds"] for one in step))
            for step in zip(*each, strict=True)
        ]


def _written(run: Path) -> list[dict[str, Any]]:
    """The steps of metrics.jsonl without the first."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == "train"][1:]


@contextmanager
def running(case: Case, engine: dict[str, Any], steps: int, folder: Path) -> Iterator[Running]:
    """A case from its start to its end; nothing of it is left."""
    cores, runs = sorted(os.sched_getaffinity(0)), []
    sizes = {name: getattr(case.layout, name) for name in DIMENSIONS}
    with ExitStack() as stack:
        for n in range(case.runs):
            name, environment = f"{case.name} {n}".replace(",", ""), _rendezvous(case.layout)
            given = {
                "engine": engine | {"accumulation": case.packs},
                "layout": sizes,
                "steps": steps,
                "output_dir": str(folder / name.replace(" ", "-")),
            }
            for rank in range(1, case.layout.world):  # before rank 0, which waits for them
                own = given | {"core": cores[n + rank]}
                stack.enter_context(_follower(own, environment | {"RANK": str(rank)}))
            own = given | {"core": cores[n]}
            entry = Entry(name, "benchmarks.scaling_rank", own, environment | {"RANK": "0"})
            runs.append(stack.enter_context(Contender(entry, folder / "logs")))
        yield Running(runs, [Path(run.entry.settings["output_dir"]) for run in runs])


def _rendezvous(layout: Layout) -> dict[str, str]:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    return ONE_THREAD | {
        "WORLD_SIZE": str(layout.world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


@contextmanager
def _follower(settings: dict[str, Any], environment: dict[str, str]) -> Iterator[None]:
    """A rank that goes where rank 0 goes."""
    command = [sys.executable, "-m", "benchmarks.scaling_rank", json.dumps(settings)]
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,  # rank 0 says what is wrong
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"} | environment,
    )
    try:
        yield
        process.wait(PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        pass
    finally:
        process.kill()
        process.wait()


def measured(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Each case's steps. All are started before the first step that counts."""
    model = models.even_folder(_work())
    chats, _ = data.write_pieces(
        data.write_chats(folder / "chats.jsonl"),
        load_tokenizer(model),
        options.pack_tokens,
        folder / "chats",
    )
    engine = {
        "model": str(model),
        "chats": str(chats),
        "pack_tokens": options.pack_tokens,
        "base_weights": "fp32",
        "memory_budget": MEMORY_BUDGET,
    }
    found = cases(options.packs)
    with ExitStack() as stack:
        alive = [
            stack.enter_context(running(case, engine, options.rounds + 1, folder)) for case in found
        ]
        for _ in range(options.rounds):
            for one in alive:
                one.step()
        steps = [one.steps() for one in alive]
    return [
        {
            "name": case.name,
            "cores": case.cores,
            "packs": case.packs * case.runs,
            "tokens": [tokens for tokens, _ in taken],
            "seconds": [seconds for _, seconds in taken],
        }
        for case, taken in zip(found, steps, strict=True)
    ]


def efficiency(found: dict[str, Any], base: dict[str, Any]) -> float:
    """Computed tokens a second of each core, against those of `base`: the median over the rounds,
    so that the machine's drift goes out of it."""
    rates = [
        [tokens / seconds / one["cores"] for tokens, seconds in _rounds(one)]
        for one in (found, base)
    ]
    return statistics.median(ours / theirs for ours, theirs in zip(*rates, strict=True))


def _rounds(found: dict[str, Any]) -> Iterator[tuple[float, float]]:
    return zip(found["tokens"], found["seconds"], strict=True)


def table(found: list[dict[str, Any]]) -> str:
    """Seconds a step, and efficiency: strong, weak, and against the machine's own limit."""
    strong, weak, apart = found[:3]
    lines = [f"{'':<32}{'s/step':>8}{'tok/s':>8}{'strong':>8}{'weak':>8}{'limit':>8}"]
    for one in found:
        rate = statistics.median(tokens / seconds for tokens, seconds in _rounds(one))
        line = f"{one['name']:<32}{statistics.median(one['seconds']):>8.2f}{rate:>8.1f}"
        for base in (strong, weak, apart):
            compared = one["cores"] > 1 and one is not base
            compared = compared and not (base is strong and one is apart)
            line += f"{efficiency(one, base):>8.0%}" if compared else f"{'-':>8}"
        lines.append(line)
    return "\n".join(lines)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_scaling")
    parser.add_argument("--rounds", type=int, default=5, help="steps of each contender")
    parser.add_argument("--packs", type=int, default=4, help="in a step; an even number")
    parser.add_argument("--pack-tokens", type=int, default=512)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    return parser.parse_args(arguments)


def main() -> int:
    options = parse(sys.argv[1:])
    try:
        if options.packs < 2 or options.packs % 2 or options.rounds < 1:
            raise UserError("--packs must be even and --rounds at least 1")
        if len(os.sched_getaffinity(0)) < 2:
            raise UserError("two cores are needed, and this process may use one")
        with tempfile.TemporaryDirectory(prefix="llamaweft-scaling-", dir=_work()) as folder:
            found = measured(options, Path(folder))
    except (UserError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    text = table(found)
    print(text)
    page = report.write_page(options.results, "scaling", f"\n\n```\n{text}\n```", {"cases": found})
    print(f"wrote {page}")
    return 0


def _work() -> Path:
    work = cache_dir() / "bench"
    work.mkdir(parents=True, exist_ok=True)
    return work


if __name__ == "__main__":
    sys.exit(main())
