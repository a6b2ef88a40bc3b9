"""Generation: one sequence against llama.cpp's q4_0 of the same weights, and 32 together.

    python -m benchmarks.bench_decode            two layers of Llama 3 8B with its whole head

All processes are alive together and decode in turn, each with two threads; a ratio is that of one
round, and the median over the rounds is printed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks import models, report
from benchmarks.contender import ROOT, Contender, Entry
from benchmarks.gguf_file import write_q4_0
from llamaweft.errors import RunError, UserError
from llamaweft.runtime import cache_dir

ONE, MANY = 1, 32
NEW_TOKENS = {ONE: 64, MANY: 8}
"""New tokens of each sequence in a round."""


def entries(folder: Path, gguf: Path) -> list[Entry]:
    found = [_entry("llama.cpp q4_0", {"kind": "llama.cpp", "model": str(gguf)}, ONE)]
    for codec in ("int8", "nf4"):
        for sequences in (ONE, MANY):
            settings = {"kind": "llamaweft", "model": str(folder), "codec": codec}
            found.append(_entry(f"llamaweft {codec} x{sequences}", settings, sequences))
    return found


def _entry(name: str, settings: dict[str, Any], sequences: int) -> Entry:
    asked = {"sequences": sequences, "new_tokens": NEW_TOKENS[sequences]}
    return Entry(name, "benchmarks.decoders", settings | asked, {})


def rate(step: dict[str, Any]) -> float:
    return step["new_tokens"] / step["decode_seconds"]


def ratios(steps: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """Medians over the rounds."""

    def ratio(one: str, other: str) -> float:
        pairs = zip(steps[one], steps[other], strict=True)
        return statistics.median(rate(a) / rate(b) for a, b in pairs)

    found = {}
    for codec in ("int8", "nf4"):
        one, many = f"llamaweft {codec} x{ONE}", f"llamaweft {codec} x{MANY}"
        found[f"{codec} to llama.cpp q4_0, one sequence"] = ratio(one, "llama.cpp q4_0")
        found[f"{codec}, {MANY} sequences together to one"] = ratio(many, one)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_decode")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, default=cache_dir() / "bench", help="models and logs")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    work = options.work.resolve()
    try:
        folder = models.llama3_folder(work, layers=2)
        gguf = write_q4_0(folder, work / "llama3-8b-2-layers-q4_0.gguf")
        with ExitStack() as alive:
            running = [
                alive.enter_context(Contender(e, work / "logs")) for e in entries(folder, gguf)
            ]
            for _ in range(options.rounds):
                for contender in running:
                    contender.step()
            steps = {c.entry.name: c.steps for c in running}
    except (UserError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    rates = {name: statistics.median(map(rate, each)) for name, each in steps.items()}
    lines = [f"{name:<44}{value:>8.1f} tokens/s" for name, value in rates.items()]
    lines += [f"{what:<44}{value:>8.2f} x" for what, value in ratios(steps).items()]
    text = "\n".join(lines)
    print(text)
    page = report.write_page(options.results, "decode", f"\n\n```\n{text}\n```", {"steps": steps})
    print(f"wrote {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
