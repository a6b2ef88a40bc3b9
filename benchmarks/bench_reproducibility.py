"""How alike runs are that should be alike: losses and trained weights.

    python -m benchmarks.bench_reproducibility --steps 5

Each run is a process. The first one against the same one again, on another number of threads, and
with packs of half the size, twice as many a step (the same rows: every step sees all of them).
Differences are relative: of a loss the greatest over the steps, of weights ||a - b|| / ||a||, the
greatest over the tensors of the adapter.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from benchmarks import report
from benchmarks.contender import ROOT
from llamaweft.errors import RunError
from llamaweft.model.init import init_random
from llamaweft.runtime import cache_dir

ROWS, TOKENS = 16, 64
LEARNING_RATE = 1e-4
Run = tuple[list[float], dict[str, Any]]
"""The loss of each step, and the adapter's tensors."""


def write_rows(path: Path) -> Path:
    """Texts of as many digits, each a token of its own, so that packs of any size hold them all."""
    draw = random.Random(0)
    texts = ["".join(draw.choices("0123456789", k=TOKENS - 1)) for _ in range(ROWS)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def write_recipe(work: Path, model: str, steps: int) -> Path:
    tree = {
        "model": model,
        "task": "text",
        "data": {"train": str(write_rows(work / "digits.jsonl")), "validation": None},
        "adapter": {"r": 8},
        "base_weights": "fp32",
        "training": {
            "max_steps": steps,
            "learning_rate": LEARNING_RATE,
            "micro_batch_tokens": ROWS * TOKENS // 2,
            "gradient_accumulation_steps": 2,
            "compute_dtype": "fp32",
            "device": "cpu",
        },
    }
    path = work / "reproducibility-recipe.json"
    path.write_text(json.dumps(tree), encoding="utf-8")
    return path


def trained(recipe: Path, threads: int, *overrides: str) -> Run:
    """A run in a process of its own. Raises RunError, with its last line, when it fails."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "llamaweft",
                "train",
                str(recipe),
                "--json",
                *overrides,
                f"output_dir={folder}/run",
            ],
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RunError(done.stderr.strip().splitlines()[-1])
        lines = (Path(folder) / "run/metrics.jsonl").read_text().splitlines()
        losses = [json.loads(line)["loss"] for line in lines if '"train"' in line]
        return losses, load_file(Path(folder) / "run/adapter/adapter_model.safetensors")


def difference(one: Run, other: Run) -> dict[str, Any]:
    """Of losses and weights, relative, and whether they are the same bits."""
    losses = max(abs(a - b) / abs(a) for a, b in zip(one[0], other[0], strict=True))
    weights = max(
        float((tensor - other[1][name]).norm() / tensor.norm()) for name, tensor in one[1].items()
    )
    same = one[0] == other[0] and all(tensor.equal(other[1][n]) for n, tensor in one[1].items())
    return {"loss": losses, "weights": weights, "same_bits": same}


def measured(name: str, model: str, work: Path, steps: int, threads: int) -> list[dict[str, Any]]:
    recipe = write_recipe(work, model, steps)
    first = trained(recipe, 1)
    halves = (
        f"training.micro_batch_tokens={ROWS * TOKENS // 4}",
        "training.gradient_accumulation_steps=4",
    )
    others = {
        "again": trained(recipe, 1),
        f"{threads} threads": trained(recipe, threads),
        "half the pack, twice as many": trained(recipe, 1, *halves),
    }
    return [{"model": name, "what": what, **difference(first, run)} for what, run in others.items()]


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| model | against | loss | weights | same bits |", "|---|---|---|---|---|"]
    lines += [
        f"| {row['model']} | {row['what']} | {row['loss']:.1e} | {row['weights']:.1e} | "
        f"{'yes' if row['same_bits'] else 'no'} |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_reproducibility")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--models", nargs="+", default=["tiny", "embedded"])
    parser.add_argument("--work", type=Path, default=cache_dir() / "bench")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    embedded = "builtin:smollm2-135m"
    rows: list[dict[str, Any]] = []
    try:
        for name in options.models:
            model = embedded
            if name == "tiny":
                model = str(work / "tiny")
                if not Path(model).exists():
                    init_random("tiny", Path(model), embedded, "fp32", seed=1)
            rows += measured(name, model, work, options.steps, options.threads)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(table(rows))
    body = f"\n\n{table(rows)}"
    page = report.write_page(options.results, "reproducibility", body, {"rows": rows})
    print(f"wrote {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
