"""The memory of an export: peak RssAnon of `llamaweft export`, read from outside.

    python -m benchmarks.bench_export llama3.2-1b --base-weights bf16
    python -m benchmarks.bench_export llama3-8b --targets hf gguf
    python -m benchmarks.bench_export builtin:smollm2-135m --verify --train

The run is made without training: a model of a preset with random weights (or a model by name), and
an adapter of random numbers of its usual size, through the pipeline. With --train it is trained for
a few steps instead, and the peak of that is given too.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import data, report
from benchmarks.contender import ROOT, Peak, train_watched
from benchmarks.models import llama3_tokenizer
from llamaweft.adapters.lora import lora_layers
from llamaweft.errors import RunError
from llamaweft.files import write_text
from llamaweft.model.init import init_random
from llamaweft.model.presets import PRESETS
from llamaweft.pipeline import Pipeline
from llamaweft.recipe import Recipe
from llamaweft.runtime import cache_dir

STEPS = 4
SAMPLE_SECONDS = 0.02


def model_name(work: Path, name: str, base_weights: str) -> str:
    """A model by name, or a folder of random weights of a preset, made once. base_weights: fp32 or
    bf16 make original weights, of which training holds a codec."""
    if name not in PRESETS:
        return name
    folder = work / f"{name}-{base_weights}"
    if not folder.exists():
        init_random(name, folder, str(llama3_tokenizer()), base_weights, seed=0)
    return str(folder)


def recipe_tree(work: Path, model: str, codec: str, budget: str | None) -> dict[str, Any]:
    return {
        "model": model,
        "data": {
            "train": str(data.write_chats(work / "chats.jsonl")),
            "max_length_tokens": 512,
            "on_too_long": "drop",
            "validation": {"fraction": 0.01},
        },
        "base_weights": codec,
        "training": {
            "max_steps": STEPS,
            "learning_rate": 1e-3,
            "micro_batch_tokens": 512,
            "gradient_accumulation_steps": 1,
            "checkpoint_every_steps": STEPS,
            "compute_dtype": "fp32",
            "device": "cpu",
            "memory_budget": budget,
        },
        "evaluation": {"every_steps": STEPS, "metrics": ["loss"]},
        "output_dir": str(work / "run"),
    }


def fabricated(tree: dict[str, Any]) -> Path:
    """A run folder with an adapter of random numbers, whose update is about 2% of the weights."""
    folder = Path(tree["output_dir"])
    recipe = Recipe.validate_tree(tree)
    pipeline = Pipeline(recipe)
    pipeline.prepare_weights(print)
    torch.manual_seed(0)
    model = pipeline.adapted(pipeline.load_to_train())
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B.normal_(0, 0.02 * layer.lora_A.shape[0] ** -0.5)
    folder.mkdir(parents=True)
    write_text(folder / "recipe.yaml", recipe.dump())
    pipeline.save_trained(model)
    return folder


class PeakOfTree:
    """The peak of the anonymous memory of a process and those that it starts, summed."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process, self.anon_bytes, self.of_one_bytes = process, 0, 0

    def watch(self) -> None:
        import psutil

        parent = psutil.Process(self.process.pid)
        while self.process.poll() is None:
            try:
                tree = [parent, *parent.children(recursive=True)]
            except psutil.Error:
                break
            each = [_anon_bytes(one.pid) for one in tree]
            self.anon_bytes = max(self.anon_bytes, sum(each))
            self.of_one_bytes = max(self.of_one_bytes, *each)
            time.sleep(SAMPLE_SECONDS)


def _anon_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    found = [line.split()[1] for line in lines if line.startswith("RssAnon:")]
    return int(found[0]) * 1024 if found else 0


def watched(*arguments: str) -> dict[str, Any]:
    """Peak and seconds of a command, and what it printed."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "llamaweft", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    peak = PeakOfTree(process)
    peak.watch()
    said, errors = process.communicate()
    if process.returncode:
        raise RunError(errors.strip().splitlines()[-1])
    return {
        "peak_anon_bytes": peak.anon_bytes,
        "seconds": time.perf_counter() - began,
        "said": said,
    }


def exported(run: Path, target: str, work: Path, verify: bool) -> dict[str, Any]:
    to, _, quantization = target.partition(":")
    output = work / "out"
    shutil.rmtree(output, ignore_errors=True)
    options = ["--quantization", quantization] if quantization else []
    options += [] if verify else ["--no-verify"]
    found = watched("export", str(run), "--to", to, "--output", str(output), "--json", *options)
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    parity = json.loads(found.pop("said"))["parity"]
    shutil.rmtree(output)
    return found | {"target": target, "verify": verify, "bytes": size, "parity": parity}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_export")
    parser.add_argument("model", help="a preset, or a model by name")
    parser.add_argument("--base-weights", default="bf16", choices=["fp32", "bf16"])
    parser.add_argument("--codec", default="nf4", help="what the run holds the base in")
    parser.add_argument("--targets", nargs="+", default=["hf", "gguf"], help="as gguf:q4_0")
    parser.add_argument("--verify", action="store_true", help="with the proof, beside without it")
    parser.add_argument("--train", action="store_true", help="train and evaluate, and watch that")
    parser.add_argument("--memory-budget", help="of the training, as the recipe's key")
    parser.add_argument("--work", type=Path, default=cache_dir() / "bench" / "export")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(options.work / "run", ignore_errors=True)
    model = model_name(options.work, options.model, options.base_weights)
    tree = recipe_tree(options.work, model, options.codec, options.memory_budget)
    lines, found = [f"{'':<28}{'peak anon GiB':>16}{'seconds':>10}"], []

    def note(name: str, one: dict[str, Any]) -> None:
        found.append(one | {"name": name})
        peak = one["peak_anon_bytes"] / report.GIB
        lines.append(f"{name:<28}{peak:>16.2f}{one['seconds']:>10.0f}")

    try:
        if options.train:
            recipe = options.work / "recipe.json"
            recipe.write_text(json.dumps(tree), encoding="utf-8")
            began = time.perf_counter()
            trained: Peak = train_watched(recipe)
            seconds = time.perf_counter() - began
            note("train", {"peak_anon_bytes": trained.anon_bytes, "seconds": seconds})
            measured = watched("evaluate", tree["output_dir"], "--json")
            measured.pop("said")
            note("evaluate", measured)
        else:
            fabricated(tree)
        for target in options.targets:
            for verify in (False, True) if options.verify else (False,):
                one = exported(Path(tree["output_dir"]), target, options.work, verify)
                note(f"export {target}{', with proof' * verify}", one)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    text = "\n".join(lines)
    print(text)
    page = report.write_page(
        options.results, f"export-{Path(options.model).name.replace(':', '-')}",
        f"\n\n```\n{text}\n```", {"runs": found},
    )  # fmt: skip
    print(f"wrote {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
