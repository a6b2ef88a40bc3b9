"""Figures of contenders and their ratios, as a table, as JSON and as Markdown."""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.contender import ROOT, Contender
from benchmarks.sgemm import Rates
from llamaweft.runtime import cache_dir

PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "xllamacpp", "numba", "numpy")
GIB = 2**30


def figures(contender: Contender, rates: Sequence[Rates] = ()) -> dict[str, Any]:
    """What a contender did in its measured steps, the warm-up left out.

    Peaks are those of its steps, the warm-up included; loading has its own. rates: taken before
    each step and after the last; each step is held against the mean of its two.
    """
    steps = contender.steps
    alive = [contender.ready, *steps]
    found: dict[str, Any] = {
        "name": contender.entry.name,
        "settings": contender.entry.settings,
        "environment": contender.entry.environment,
        "steps": len(steps),
        "real_tokens_per_second": _rate(steps, "real_tokens"),
        "median_seconds": statistics.median(step["seconds"] for step in steps),
        "mean_step_tokens": statistics.mean(step["real_tokens"] for step in steps),
        "computed_per_real_token": _rate(steps, "computed_tokens") / _rate(steps, "real_tokens"),
        "mean_loss": statistics.mean(step["loss"] for step in steps),
        "load_and_warm_up_seconds": contender.ready["load_and_warm_up_seconds"],
        "peak_anon_bytes": max(step["peak_anon_bytes"] for step in alive),
        "peak_rss_bytes": max(step["peak_rss_bytes"] for step in alive),
        "each_step": steps,
    }
    for name in Rates._fields if rates else ():
        of_each = [getattr(rate, name) for rate in rates]
        shares = [
            step["useful_flops"] / step["seconds"] / statistics.mean(of_each[i : i + 2])
            for i, step in enumerate(steps)
        ]
        found[f"share_of_{name}"] = statistics.median(shares)
        found[f"{name}_flops_per_second"] = of_each
    return found


def _rate(steps: Sequence[dict[str, Any]], key: str) -> float:
    return sum(step[key] for step in steps) / sum(step["seconds"] for step in steps)


def ratio(ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> float:
    """How many times as fast ours is: the median over the rounds, each a step of both, so that
    the machine's drift goes out of it."""
    pairs = zip(ours, theirs, strict=True)
    return statistics.median(
        _rate([a], "real_tokens") / _rate([b], "real_tokens") for a, b in pairs
    )


def table(case: dict[str, Any]) -> str:
    """Contenders and ratios of a case in 80 columns."""
    columns = (
        f"{'tok/s':>8}{'s/step':>8}{'tok/step':>9}{'anon':>7}{'rss':>7}{'sgemm':>7}{'best':>6}"
    )
    lines = [case["title"], f"{'contender':<28}{columns}"]
    for found in case["contenders"]:
        shares = [found.get(f"share_of_{name}") for name in Rates._fields]
        sgemm, fastest = ("-" if share is None else f"{share:.0%}" for share in shares)
        lines.append(
            f"{found['name']:<28}{found['real_tokens_per_second']:>8.1f}"
            f"{found['median_seconds']:>8.2f}{found['mean_step_tokens']:>9.0f}"
            f"{found['peak_anon_bytes'] / GIB:>7.2f}{found['peak_rss_bytes'] / GIB:>7.2f}"
            f"{sgemm:>7}{fastest:>6}"
        )
    lines += [f"{what}: {value}" for what, value in case["ratios"].items()]
    return "\n".join(lines)


def write(results: Path, name: str, cases: list[dict[str, Any]]) -> Path:
    """Write NAME-DATE.json and .md into `results`; returns the Markdown's path."""
    text = "\n\n".join(f"```\n{table(case)}\n```" for case in cases)
    return write_page(results, name, f"Memory in GiB.\n\n{text}", {"cases": cases})


def write_page(results: Path, name: str, text: str, figures: dict[str, Any]) -> Path:
    """Write NAME-DATE.json (all figures) and .md (the text), with where they are from."""
    results.mkdir(parents=True, exist_ok=True)
    now = datetime.now(UTC)
    target = results / f"{name}-{now:%Y-%m-%d}"
    source = {"date": now.isoformat(timespec="seconds"), **provenance()}
    content = json.dumps(source | figures, indent=1).replace(str(cache_dir()), "CACHE")
    target.with_name(f"{target.name}.json").write_text(content + "\n", encoding="utf-8")
    facts = "\n".join(f"- {key}: {_inline(value)}" for key, value in source.items())
    page = target.with_name(f"{target.name}.md")
    page.write_text(
        f"# {name}, {now:%Y-%m-%d}\n\n{facts}\n\nHow to read this: "
        f"[../README.md](../README.md). {text}\n",
        encoding="utf-8",
    )
    return page


def _inline(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return str(value)


def provenance() -> dict[str, Any]:
    """Device, versions, commit and command."""
    return {
        "command": shlex.join(["python", "-m", f"benchmarks.{_program()}", *sys.argv[1:]]),
        "commit": _commit(),
        "device": _device(),
        "versions": {"python": platform.python_version()}
        | {name: _version(name) for name in PACKAGES},
    }


def _program() -> str:
    return Path(sys.argv[0]).stem


def _commit() -> str:
    """The commit, with `+changes` where the tree differs from it."""
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run(
        [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True
    )
    return commit.stdout.strip() + ("+changes" if changed.stdout.strip() else "")


def _device() -> dict[str, Any]:
    """Processor, cores, vector instruction sets and memory."""
    facts: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    vectors = [f for f in facts.get("flags", "").split() if f.startswith(("avx", "amx", "fma"))]
    return {
        "processor": facts.get("model name", platform.processor()),
        "family": f"{facts.get('cpu family', '?')} model {facts.get('model', '?')}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "vectors": " ".join(sorted(vectors)),
        "memory_gib": round(psutil.virtual_memory().total / GIB, 1),
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
