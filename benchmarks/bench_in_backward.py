"""The optimizer in the backward pass against a step after it: peak memory and seconds a step.

    python -m benchmarks.bench_in_backward

Full fine-tuning of the embedded model, one pack a step and no clipping, each in a process of
`llamaweft train`; the plan of both, and the peak of anonymous memory.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import data, report
from benchmarks.contender import ROOT, train_watched
from llamaweft.errors import RunError
from llamaweft.runtime import cache_dir

KEY = "training.optimizer_in_backward"


def write_recipe(work: Path, steps: int, pack_tokens: int) -> Path:
    tree = {
        "model": "builtin:smollm2-135m",
        "data": {
            "train": str(data.write_chats(work / "chats.jsonl")),
            "validation": None,
            "max_length_tokens": pack_tokens,
            "on_too_long": "drop",
        },
        "adapter": {"method": "none"},
        "training": {
            "learning_rate": 1e-5,
            "max_steps": steps,
            "micro_batch_tokens": pack_tokens,
            "gradient_accumulation_steps": 1,
            "max_grad_norm": None,
            "compute_dtype": "fp32",
            "device": "cpu",
        },
    }
    path = work / "in-backward-recipe.json"
    path.write_text(json.dumps(tree), encoding="utf-8")
    return path


def measured(recipe: Path, fused: bool) -> dict[str, Any]:
    """Peak and plan in GiB, and the median seconds of a step and its losses."""
    with tempfile.TemporaryDirectory(dir=recipe.parent) as folder:
        run = Path(folder) / "run"
        peak = train_watched(recipe, f"{KEY}={str(fused).lower()}", f"output_dir={run}")
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        plan = json.loads((run / "plan.json").read_text())
    return {
        "fused": fused,
        "peak_anon_bytes": peak.anon_bytes,
        "planned_bytes": plan["peak_bytes"],
        "planned_parts": plan["parts"],
        "seconds": [line["seconds"] for line in lines],
        "losses": [line["loss"] for line in lines],
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_in_backward")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--pack-tokens", type=int, default=256)
    parser.add_argument("--work", type=Path, default=cache_dir() / "bench", help="data and runs")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    recipe = write_recipe(options.work, options.steps, options.pack_tokens)
    try:
        found = [measured(recipe, fused) for fused in (False, True)]
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    lines = [f"{'GiB':<24}{'measured':>12}{'planned':>12}{'s a step':>12}"]
    for one in found:
        name = "in the backward pass" if one["fused"] else "after it"
        sizes = (one["peak_anon_bytes"] / report.GIB, one["planned_bytes"] / report.GIB)
        seconds = sorted(one["seconds"])[len(one["seconds"]) // 2]
        lines.append(f"{name:<24}{sizes[0]:>12.2f}{sizes[1]:>12.2f}{seconds:>12.2f}")
    lines.append(f"the same losses: {found[0]['losses'] == found[1]['losses']}")
    text = "\n".join(lines)
    print(text)
    page = report.write_page(
        options.results, "in-backward", f"\n\n```\n{text}\n```", {"runs": found}
    )
    print(f"wrote {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
