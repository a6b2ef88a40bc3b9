"""The plan against the run: peak memory, and seconds a step held against sgemm.

    python -m benchmarks.bench_plan embedded 1b            minutes
    python -m benchmarks.bench_plan whole8b --rounds 1     a quarter of an hour

For each model: `llamaweft plan --json` in a process of its own, then steps of the same recipe by
`benchmarks.engine`; sgemm is measured before the plan, after it, and around each step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import data, models, report
from benchmarks.contender import ROOT, Contender, Entry
from benchmarks.engine import Settings
from benchmarks.sgemm import Sgemm, model_shapes
from llamaweft.errors import RunError, UserError
from llamaweft.model.tokenizer import load_tokenizer
from llamaweft.runtime import cache_dir


@dataclass(frozen=True)
class Case:
    """What is planned and run; budget: training.memory_budget."""

    name: str
    model: Path
    base_weights: str
    pack_tokens: int
    budget: str | None = None


def cases(names: list[str], work: Path) -> list[Case]:
    made = []
    for name in names:
        if name == "embedded":
            folder = models.embedded_folder()
            made += [Case(name, folder, "fp32", tokens) for tokens in (256, 1024)]
        elif name == "1b":
            folder = models.llama3_store(work, "nf4", "llama3.2-1b")
            made += [Case(name, folder, "nf4", 1024), Case(name, folder, "nf4", 1024, "1.2GiB")]
        else:
            folder = models.llama3_store(work, "nf4")
            made.append(Case(name, folder, "nf4", 1024, "2.5GiB"))
    return made


def compare(case: Case, work: Path, rounds: int) -> dict[str, Any]:
    """Plan, run, and both beside each other."""
    chats, tokens = data.write_pieces(
        data.write_chats(work / "chats.jsonl"),
        load_tokenizer(case.model),
        case.pack_tokens,
        work / f"{case.model.name}-chats",
    )
    share = data.describe(tokens)["trained_share"]
    sgemm = Sgemm(model_shapes(case.model, share), case.pack_tokens)
    settings: dict[str, Any] = {
        "model": str(case.model),
        "chats": str(chats),
        "pack_tokens": case.pack_tokens,
        "accumulation": 1,
        "base_weights": case.base_weights,
        "memory_budget": case.budget,
    }
    before = sgemm.measure()
    plan = planned(Settings(**settings))
    planning_rate = (before + sgemm.measure()) / 2
    name = f"{case.name} {case.base_weights} {case.budget or ''}".strip()
    entry = Entry(f"{name} @{case.pack_tokens}", "benchmarks.engine", settings, {})
    rates, each = [sgemm.measure()], []
    with Contender(entry, work / "logs") as running:
        for _ in range(rounds):
            step = running.step()
            rates.append(sgemm.measure())
            # A mean step is planned: this one has more or fewer tokens.
            size = step["computed_tokens"] / (plan["computed_tokens"] / plan["steps"])
            drift = planning_rate / statistics.mean(rates[-2:])
            each.append(plan["seconds_per_step"] * size * drift / step["seconds"])
        peak = max(s["peak_anon_bytes"] for s in [running.ready, *running.steps])
    return {
        "name": entry.name,
        "planned_bytes": plan["peak_bytes"],
        "measured_bytes": peak,
        "memory": plan["peak_bytes"] / peak,
        "planned_seconds": plan["seconds_per_step"],
        "measured_seconds": [step["seconds"] for step in running.steps],
        "time": statistics.median(each),
        "sgemm_planning": planning_rate,
        "sgemm_running": rates,
        "plan": plan,
    }


def planned(settings: Settings) -> dict[str, Any]:
    """What `llamaweft plan` says in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe.yaml"
        recipe.write_text(settings.recipe(f"{folder}/run").dump(), encoding="utf-8")
        command = [sys.executable, "-m", "llamaweft", "plan", str(recipe), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RunError(done.stderr.strip())
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_plan")
    parser.add_argument("models", nargs="+", choices=["embedded", "1b", "whole8b"])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--work", type=Path, default=cache_dir() / "bench", help="models and logs")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    work, found = options.work.resolve(), []
    lines = [f"{'planned / measured':<36}{'memory':>16}{'time, scaled':>16}"]
    print(lines[0], flush=True)
    try:
        for case in cases(options.models, work):
            found.append(compare(case, work, options.rounds))
            one = found[-1]
            lines.append(f"{one['name']:<36}{one['memory']:>16.2f}{one['time']:>16.2f}")
            print(lines[-1], flush=True)
    except (UserError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    text = "\n".join(lines)
    name = "plan-" + "-".join(options.models)
    page = report.write_page(options.results, name, f"\n\n```\n{text}\n```", {"cases": found})
    print(f"wrote {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
