"""Kills real training at random moments, resumes it each time until it is over, and holds what it
left against an uninterrupted run: every bit, every number, every pack in its place.

    python tests/faults/kills.py --kills 200 --seed 0     (Linux)

Half of the kills come as soon as a checkpoint is being written, the others at any time. Each run is
`llamaweft train --resume` in a process of its own: a copy of one that has imported everything and
computed nothing, so that a start takes about a second. Ends with 1 when anything differs.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open

from llamaweft.plan.plan import Plan
from llamaweft.recipe import Recipe
from llamaweft.train.checkpoint import complete_checkpoints, what_is_wrong
from llamaweft.train.run_folder import read_lines
from llamaweft.verify.compare import compare_runs
from llamaweft.verify.part import Part
from llamaweft.verify.resume import IMPORTED_ONCE

STEPS = 26
"""More than the guard's warm-up."""

SECONDS_BETWEEN_LOOKS = 0.0002
LATEST_WRITES = 4
"""The kill comes in one of the first so many writes after a start."""

LONGEST_WAIT = 0.01
"""Seconds after a write was seen to begin."""


@dataclass
class Figures:
    """kills: how many were made. inside_write: of these, those that left a half-written or
    half-replaced checkpoint. starts: processes in all. runs: that were finished, identical or not.
    """

    kills: int = 0
    inside_write: int = 0
    starts: int = 0
    runs: int = 0
    identical: int = 0


def write_files(folder: Path, model: Path, codec: str = "fp32", **training: Any) -> Path:
    """A recipe that uses what a checkpoint must hold: dropout, accumulation, best-so-far, the
    guard's running mean of the loss; and its rows."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{i}" + " please" * (i % 4)},
                {"role": "assistant", "content": f"{i * i}" + " indeed" * (i % 3)},
            ]
        }
        for i in range(40)
    ]
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    tree = {
        "model": str(model),
        "data": {"train": str(folder / "chats.jsonl"), "validation": {"fraction": 0.1}},
        "adapter": {"r": 8, "lora_dropout": 0.1},
        "base_weights": codec,
        "training": {
            "learning_rate": 2e-3,
            "max_steps": STEPS,
            "micro_batch_tokens": 64,
            "gradient_accumulation_steps": 2,
            "checkpoint_every_steps": 1,
            "compute_dtype": "fp32",
            "device": "cpu",
        }
        | training,
        "evaluation": {"every_steps": 9, "metrics": ["loss"], "early_stopping_patience": None},
        "guard": {"loss_spike": 1.5, "max_skipped_steps": 9},
        "output_dir": str(folder / "whole"),
    }
    recipe = folder / "recipe.yaml"
    recipe.write_text(json.dumps(tree), encoding="utf-8")
    return recipe


def train(recipe: Path, output: Path, log: Path, plan: Plan) -> None:
    """What a process does: the command, with the order of its packs written down; the machine is
    measured once for all."""
    from llamaweft import pipeline
    from llamaweft.cli.app import main

    with log.open("ab") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    pipeline.Pipeline = partial(Part, given_plan=plan)  # type: ignore[misc]
    sys.argv = ["llamaweft", "train", str(recipe), f"output_dir={output}", "--resume"]
    main()


def start(recipe: Path, output: Path, plan: Plan) -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*IMPORTED_ONCE, "llamaweft.cli.train"])
    log = output.with_name(f"{output.name}.log")
    process = context.Process(target=train, args=(recipe, output, log, plan), daemon=True)
    process.start()
    return process


class Killing:
    """Runs of one recipe, killed until so many kills were made."""

    def __init__(self, recipe: Path, kills: int, seed: int) -> None:
        self.recipe, self.kills, self.random = recipe, kills, random.Random(seed)
        self.folder, self.figures = recipe.parent, Figures()
        self.whole = self.folder / "whole"
        self.plan = Part(Recipe.load(recipe)).plan()
        began = time.perf_counter()
        self.seconds = 1.0
        if self._run(self.whole, may_kill=False) != 0:
            raise AssertionError(f"the uninterrupted run failed: {self._log(self.whole)}")
        self.seconds = time.perf_counter() - began

    def __call__(self) -> Figures:
        while self.figures.kills < self.kills or not self.figures.runs:
            output = self.folder / f"killed-{self.figures.runs + 1}"
            while (code := self._run(output, may_kill=True)) != 0:
                if code is not None and code > 0:
                    raise AssertionError(f"--resume ended with {code}: {self._log(output)}")
                check_sound(output)
            check_sound(output)
            self.figures.runs += 1
            differences = compare_runs(self.whole, output, 0).differences
            if differences:
                raise AssertionError(f"{output} differs: {differences}")
            self.figures.identical += 1
        return self.figures

    def _run(self, output: Path, *, may_kill: bool) -> int | None:
        process = start(self.recipe, output, self.plan)
        self.figures.starts += 1
        if may_kill and self.figures.kills < self.kills:
            if self.random.random() < 0.5:
                self._wait_for_write(process, output / "checkpoints")
            else:
                process.join(self.random.uniform(0, self.seconds))
            if process.is_alive():
                process.kill()
                process.join()
                if process.exitcode == -9:
                    self.figures.kills += 1
                    self.figures.inside_write += bool(left_over(output))
        process.join()
        code: int | None = process.exitcode
        return code

    def _wait_for_write(self, process: Any, checkpoints: Path) -> None:
        """Until one of the next checkpoints is being written."""
        wanted, appeared, before = self.random.randint(1, LATEST_WRITES), 0, written(checkpoints)
        while process.is_alive():
            now = written(checkpoints)
            appeared += len(now - before)
            if now - before and appeared >= wanted:
                time.sleep(self.random.uniform(0, LONGEST_WAIT))
                return
            before = now
            time.sleep(SECONDS_BETWEEN_LOOKS)

    def _log(self, output: Path) -> str:
        return output.with_name(f"{output.name}.log").read_text(errors="replace")[-2000:]


def written(checkpoints: Path) -> set[str]:
    """The checkpoints that are being written, or whose writing was cut short."""
    try:
        return {name for name in os.listdir(checkpoints) if name.endswith(".tmp")}
    except FileNotFoundError:
        return set()


def left_over(output: Path) -> list[Path]:
    """What a kill in the midst of a checkpoint's writing, replacing or deleting leaves."""
    return list((output / "checkpoints").glob(".step-*"))


def check_sound(output: Path) -> None:
    """Raises AssertionError where anything in the run folder is corrupt."""
    for checkpoint in complete_checkpoints(output / "checkpoints"):
        assert what_is_wrong(checkpoint) is None, what_is_wrong(checkpoint)
    for path in output.rglob("*"):
        within = path.relative_to(output).parts
        if path.is_dir() or any(part.startswith(".") for part in within):
            continue  # aside: not counted as there
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".jsonl":
            read_lines(path)
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - it is no dict
                    file.get_tensor(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    from llamaweft.model.init import init_random

    with tempfile.TemporaryDirectory() as folder:
        os.environ["LLAMAWEFT_CACHE"] = str(Path(folder) / "cache")
        init_random("tiny", Path(folder) / "tiny", "builtin:smollm2-135m", "fp32", seed=1)
        began = time.perf_counter()
        recipe = write_files(Path(folder), Path(folder) / "tiny")
        figures = Killing(recipe, given.kills, given.seed)()
        print(json.dumps(asdict(figures) | {"seconds": round(time.perf_counter() - began)}))


if __name__ == "__main__":
    main()
