"""A sweep against the same runs one after another: seconds, memory, and the start.

    python -m benchmarks.bench_sweep --steps 4 --values 1e-4,3e-4,1e-3,3e-3

Both are processes of `llamaweft train` on the embedded model, taken in turn: the sweep, then each
run by itself; the next round the other way round. What was prepared and converted is there for
both.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import data, report
from benchmarks.contender import ROOT, train_watched
from llamaweft.errors import RunError
from llamaweft.runtime import cache_dir

GIB = 2**30
KEY = "training.learning_rate"


def write_recipe(work: Path, steps: int, base_weights: str) -> Path:
    """The demo's kind of run: chats, LoRA on all linear layers, measured before and after."""
    tree = {
        "model": "builtin:smollm2-135m",
        "data": {
            "train": str(data.write_chats(work / "chats.jsonl")),
            "validation": {"fraction": 0.02},
            "max_length_tokens": 512,
            "on_too_long": "drop",
        },
        "base_weights": base_weights,
        "training": {
            "max_steps": steps,
            "micro_batch_tokens": 512,
            "gradient_accumulation_steps": 2,
            "device": "cpu",
        },
        "evaluation": {"every_steps": None},
    }
    path = work / "sweep-recipe.json"
    path.write_text(json.dumps(tree), encoding="utf-8")
    return path


def trained(recipe: Path, *arguments: str) -> dict[str, Any]:
    """Seconds of `llamaweft train` from start to end, and the peak of its anonymous memory."""
    with tempfile.TemporaryDirectory(dir=recipe.parent) as folder:
        began = time.perf_counter()
        peak = train_watched(recipe, "--json", *arguments, f"output_dir={folder}/run")
        seconds = time.perf_counter() - began
        steps = sum(
            json.loads(line)["seconds"]
            for metrics in Path(folder).rglob("metrics.jsonl")
            for line in metrics.read_text().splitlines()
            if json.loads(line)["kind"] == "train"
        )
    return {"seconds": seconds, "step_seconds": steps, "anon_bytes": peak.anon_bytes}


def one_round(recipe: Path, values: list[str], sweep_first: bool) -> dict[str, Any]:
    together: list[dict[str, Any]] = []
    alone: list[dict[str, Any]] = []
    for sweeps in (sweep_first, not sweep_first):
        if sweeps:
            together.append(trained(recipe, "--sweep", f"{KEY}={','.join(values)}"))
        else:
            alone = [trained(recipe, f"{KEY}={value}") for value in values]
    return {"sweep": together[0], "alone": alone}


def table(rounds: list[dict[str, Any]]) -> str:
    """The rounds in 80 columns; memory of separate runs as if they ran at once, and of the largest
    of them."""
    lines = [
        f"{'':<8}{'sweep, s':>10}{'alone, s':>10}{'not steps, s':>16}{'sweep, GiB':>12}"
        f"{'alone, GiB':>22}"
    ]
    for number, one in enumerate(rounds, 1):
        sweep, alone = one["sweep"], one["alone"]
        total = sum(run["seconds"] for run in alone)
        rest = [run["seconds"] - run["step_seconds"] for run in (sweep, *alone)]
        peaks = [run["anon_bytes"] / GIB for run in alone]
        lines.append(
            f"{'round ' + str(number):<8}{sweep['seconds']:>10.1f}{total:>10.1f}"
            f"{f'{rest[0]:.1f} / {sum(rest[1:]):.1f}':>16}{sweep['anon_bytes'] / GIB:>12.2f}"
            f"{f'{max(peaks):.2f}, all {sum(peaks):.2f}':>22}"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_sweep")
    parser.add_argument("--values", default="1e-4,3e-4,1e-3,3e-3", help=f"of {KEY}")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--base-weights", default="nf4")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--work", type=Path, default=cache_dir() / "bench")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    recipe, values = (
        write_recipe(work, options.steps, options.base_weights),
        options.values.split(","),
    )
    try:
        trained(recipe, f"{KEY}={values[0]}", "training.max_steps=1")  # prepares and converts
        rounds = [one_round(recipe, values, i % 2 == 0) for i in range(options.rounds)]
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    text = table(rounds)
    print(text)
    page = report.write_page(options.results, "sweep", f"\n\n```\n{text}\n```", {"rounds": rounds})
    print(f"wrote {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
