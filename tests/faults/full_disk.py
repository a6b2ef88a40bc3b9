"""Trains on disks that are too small, one size after another, so that writing fails at another place
each time; then makes room, resumes, and holds the result against an uninterrupted run.

    unshare -rm python tests/faults/full_disk.py --sizes 40     (Linux; mounts tmpfs)

The checks of free room before a run are switched off: this is about what fails late. Every run must
end complete, or with one sentence and exit code 1 or 2; nothing half-written may count as complete.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from kills import check_sound, write_files

from llamaweft.plan.plan import Plan
from llamaweft.recipe import Recipe
from llamaweft.verify.compare import compare_runs
from llamaweft.verify.part import Part
from llamaweft.verify.resume import IMPORTED_ONCE

KIB = 1024


@dataclass
class Figures:
    """points: disks that were tried. failed: of these, those on which the run could not end.
    places: what could not be written, and how often. resumed: that then equalled the whole run."""

    points: int = 0
    failed: int = 0
    resumed: int = 0
    places: dict[str, int] = field(default_factory=dict)


def train(recipe: Path, output: Path, cache: Path, log: Path, plan: Plan | None) -> None:
    """What a process does: the command, without looking for room first."""
    from llamaweft import pipeline
    from llamaweft.cli.app import main
    from llamaweft.weights import build

    os.environ["LLAMAWEFT_CACHE"] = str(cache)
    with log.open("wb") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    pipeline.Pipeline = partial(Part, given_plan=plan)  # type: ignore[misc]
    for module in (pipeline, build):
        module.need_disk = lambda *_: None  # type: ignore[attr-defined]
    sys.argv = ["llamaweft", "train", str(recipe), f"output_dir={output}", "--resume"]
    main()


def run(recipe: Path, output: Path, cache: Path, plan: Plan | None = None) -> tuple[int, str]:
    """(exit code, what was said on stderr)."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*IMPORTED_ONCE, "llamaweft.cli.train"])
    log = recipe.parent / "log"
    given = (recipe, output, cache, log, plan)
    process = context.Process(target=train, args=given, daemon=True)
    process.start()
    process.join()
    return process.exitcode or 0, log.read_text(errors="replace")


def mount(folder: Path, options: str) -> None:
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)


def used_kib(folder: Path) -> int:
    """What the files in a folder take of a tmpfs, whose pages are of 4 KiB."""
    return sum(-(-p.stat().st_size // 4096) * 4 for p in folder.rglob("*") if p.is_file())


class FullDisks:
    """A recipe, its uninterrupted run, and the same on disks of growing size. cache: whether it is
    the cache that has too little room, or the run folder."""

    def __init__(self, folder: Path, model: Path, *, cache: bool) -> None:
        self.folder, self.cache = folder, cache
        self.recipe = write_files(folder, model, "nf4", max_steps=3)
        self.figures = Figures()
        self.whole, self.disk = folder / "whole", folder / "disk"
        code, said = run(self.recipe, self.whole, folder / "cache")
        assert code == 0, said
        self.plan = Part(Recipe.load(self.recipe)).plan()

    def __call__(self, sizes: int) -> Figures:
        needed = used_kib(self.folder / "cache" if self.cache else self.whole)
        for number in range(1, sizes + 1):
            # A little over what a whole run leaves: while it runs, more is there.
            self._try(max(4, 4 * round(1.6 * needed * number / sizes / 4)))
        return self.figures

    def _try(self, kib: int) -> None:
        mount(self.disk, f"size={kib}k")
        try:
            output = self.folder / f"run-{kib}"
            if not self.cache:  # by another name, so that the order of packs has room
                (self.disk / "run").mkdir()
                output.symlink_to(self.disk / "run")
            cache = self.disk / "cache" if self.cache else self.folder / "cache"
            code, said = run(self.recipe, output, cache, self.plan)
            self.figures.points += 1
            assert "Traceback" not in said, f"{kib} KiB: {said}"
            if code:
                self._failed(kib, code, said)
            if output.exists():
                check_sound(output)
            subprocess.run(["mount", "-o", "remount,size=64m", self.disk], check=True)
            code, said = run(self.recipe, output, cache, self.plan)
            assert code == 0, f"{kib} KiB, with room again: {said}"
            check_sound(output)
            differences = compare_runs(self.whole, output, 0).differences
            assert not differences, f"{kib} KiB: {differences}"
            self.figures.resumed += 1
        finally:
            subprocess.run(["umount", self.disk], check=True)

    def _failed(self, kib: int, code: int, said: str) -> None:
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        assert code in (1, 2), f"{kib} KiB: exit code {code}: {said}"
        assert len(errors) == 1, f"{kib} KiB: {said}"
        place = errors[0].replace(str(self.folder), "").removeprefix("error: ")[:60]
        self.figures.failed += 1
        self.figures.places[place] = self.figures.places.get(place, 0) + 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sizes", type=int, default=40)
    parser.add_argument("--only", choices=["run", "cache"], help="the disk that is full")
    parser.add_argument("--model", type=Path, help="a tiny model's folder; default: made anew")
    given = parser.parse_args()
    from llamaweft.model.init import init_random

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["LLAMAWEFT_CACHE"] = str(folder / "cache-of-models")
        model: Any = given.model
        if model is None:
            model = folder / "tiny"
            init_random("tiny", model, "builtin:smollm2-135m", "fp32", seed=1)
        for cache in (False, True) if given.only is None else (given.only == "cache",):
            place = folder / ("for-cache" if cache else "for-run")
            place.mkdir()
            figures = FullDisks(place, model, cache=cache)(given.sizes)
            print(json.dumps({"full": "cache" if cache else "run folder"} | asdict(figures)))


if __name__ == "__main__":
    main()
