"""The proof of every export: how much each format differs, as a Markdown table.

    python -m benchmarks.bench_parity builtin:smollm2-135m --train
    python -m benchmarks.bench_parity llama3.2-1b
    python -m benchmarks.bench_parity llama3.2-1b --only q5_0 q4_1 q4_0

Each export is opened by its real consumer (docs/export.md). The run is trained for a few steps with
--train, else it is an adapter of random numbers (bench_export.py); a preset has random weights and
Llama 3's vocabulary.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.bench_export import fabricated, model_name, recipe_tree
from benchmarks.contender import ROOT
from llamaweft.errors import RunError, UserError
from llamaweft.export.gguf import QUANTIZATIONS
from llamaweft.pipeline import Pipeline
from llamaweft.recipe import Recipe
from llamaweft.runtime import cache_dir
from llamaweft.subject import export_run

HEAD = (
    "| export | merged into | opened by | relative | allowed | max | KL, nats | same greedy | "
    "KL to live |"
)
FORMATS = [
    ("peft", {}),
    ("hf", {"merge_into": "original"}),
    ("hf", {"merge_into": "dequantised"}),
    *[("gguf", {"quantization": name}) for name in QUANTIZATIONS],
    ("ollama", {}),
]


def proven(run: Path, to: str, options: dict[str, str], output: Path) -> dict[str, Any]:
    """What parity.json says, with the seconds and bytes of the export."""
    shutil.rmtree(output, ignore_errors=True)
    began = time.perf_counter()
    name = " ".join([to, *options.values()])
    try:
        parity = export_run(run, to, output, **options)
    except (RunError, UserError) as error:
        return {"export": name, "error": str(error)}
    assert parity is not None
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    shutil.rmtree(output)
    seconds = time.perf_counter() - began
    return {"export": name, "seconds": seconds, "bytes": size, **parity.to_dict()}


def row(found: dict[str, Any]) -> str:
    if "error" in found:
        return f"| {found['export']} | {found['error']} |"
    live = found["kl_to_live"]
    cells = [
        found["export"],
        found["merged_into"] or "",
        found["consumer"],
        f"{found['relative_difference']:.1e}",
        f"{found['tolerance']:.0e}",
        f"{found['max_difference']:.1e}",
        f"{found['kl']:.1e}",
        f"{found['same_greedy_tokens']:.1%} of {found['tokens']}",
        "" if live is None else f"{live:.1e}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_parity")
    parser.add_argument("model", help="a preset, or a model by name")
    parser.add_argument("--base-weights", default="bf16", choices=["fp32", "bf16"])
    parser.add_argument("--codec", default="nf4", help="what the run holds the base in")
    parser.add_argument("--train", action="store_true", help="train for a few steps")
    parser.add_argument("--work", type=Path, default=cache_dir() / "bench" / "parity")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--only", nargs="+", help="of the formats, those with one of these words")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(options.work / "run", ignore_errors=True)
    model = model_name(options.work, options.model, options.base_weights)
    tree = recipe_tree(options.work, model, options.codec, None)
    run = Path(tree["output_dir"])
    if options.train:
        Pipeline(Recipe.validate_tree(tree)).train(say=print)
    else:
        fabricated(tree)
    found, lines = [], [HEAD, "|" + "---|" * HEAD.count(" | ") + "---|"]
    print("\n".join(lines))
    for to, more in FORMATS:
        if options.only and not {to, *more.values()} & {*options.only}:
            continue
        found.append(proven(run, to, more, options.work / "out"))
        lines.append(row(found[-1]))
        print(lines[-1], flush=True)
    page = report.write_page(
        options.results,
        f"parity-{Path(options.model).name.replace(':', '-')}",
        "\n\n" + "\n".join(lines),
        {"exports": found},
    )
    print(f"wrote {page}")
    return 1 if any("error" in one for one in found) else 0


if __name__ == "__main__":
    sys.exit(main())
