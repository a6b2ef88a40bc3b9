"""Flips one bit of each file of a run folder, of the cache and of a checkpoint in turn, and uses the
run: either the file is named, or nothing changes by it.

    python tests/faults/flips.py --flips 3 --seed 0

Each flip is in a copy. What is allowed: exit code 0 and the same result as before, or exit code 2
(of a step that was begun, 1) and a sentence that names the file.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kills import write_files

from llamaweft.train.checkpoint import complete_checkpoints

NOT_READ = (".md", ".html", ".lock", ".log")
"""What no command reads: reports are for people."""


@dataclass
class Figures:
    """flips: bits in all. found: the file was named. harmless: the result was the same, since the
    file was made again, or not needed, or says the same. by_file: found, by the name of the file.
    """

    flips: int = 0
    found: int = 0
    harmless: int = 0
    by_file: dict[str, int] = field(default_factory=dict)


def call(*arguments: object) -> tuple[int, str, str]:
    """(exit code, stdout, errors) of a command, in this process."""
    from llamaweft.cli.app import main

    before = sys.argv
    sys.argv = ["llamaweft", *map(str, arguments)]
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0
        return code, out.getvalue(), err.getvalue()
    finally:
        sys.argv = before
    return 0, out.getvalue(), err.getvalue()


def flip(path: Path, chosen: random.Random) -> int:
    """Flip a random bit, and say which."""
    content = bytearray(path.read_bytes())
    bit = chosen.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    return bit


class Flipping:
    """A finished run, and what its commands say of it while it is sound."""

    def __init__(self, folder: Path, model: Path, **training: Any) -> None:
        self.folder, self.cache = folder, folder / "cache"
        self.recipe = write_files(folder, model, "nf4", max_steps=4, **training)
        self.run = folder / "whole"
        self.figures = Figures()
        os.environ["LLAMAWEFT_CACHE"] = str(self.cache)
        code, _, said = call("train", self.recipe)
        assert code == 0, said
        self.sound = self.results(self.run)

    def results(self, run: Path) -> list[tuple[int, str, str]]:
        """Of every command that uses a run: its exit code, what it found, what it complained of."""
        evaluated = call("evaluate", run, "--json")
        exported = call("export", run, "--to", "peft", "--no-verify", "--output", run / ".export")
        digest = ""
        if exported[0] == 0:
            digest = (run / ".export/adapter_model.safetensors").read_bytes().hex()
            shutil.rmtree(run / ".export")
        resumed = call("train", self.recipe, f"output_dir={run}", "--resume", "--json")
        weights = ""
        if resumed[0] == 0:
            newest = complete_checkpoints(run / "checkpoints")[-1]
            weights = (newest / "trained.safetensors").read_bytes().hex()
            weights += (run / "adapter/adapter_model.safetensors").read_bytes().hex()
            weights += json.dumps(json.loads(resumed[1])["evaluation"])
        return [
            (evaluated[0], evaluated[1], evaluated[2]),
            (exported[0], digest, exported[2]),
            (resumed[0], weights, resumed[2]),
        ]

    def files(self) -> Iterator[Path]:
        """Those of the run folder, and of the cache."""
        for root in (self.run, self.cache):
            for path in sorted(root.rglob("*")):
                if path.is_file() and path.stat().st_size and not path.name.endswith(NOT_READ):
                    yield path

    def __call__(self, flips: int, seed: int) -> Figures:
        chosen = random.Random(seed)
        for path in list(self.files()):
            for _ in range(flips):
                self._try(path, chosen)
        return self.figures

    def _try(self, path: Path, chosen: random.Random) -> None:
        copies = self.folder / "copies"
        in_run = path.is_relative_to(self.run)
        shutil.copytree(self.run, copies / "run")
        shutil.copytree(self.cache, copies / "cache")
        target = copies / ("run" if in_run else "cache")
        target = target / path.relative_to(self.run if in_run else self.cache)
        os.environ["LLAMAWEFT_CACHE"] = str(copies / "cache")
        try:
            where = f"bit {flip(target, chosen)} of {target.relative_to(copies)}"
            results = self.results(copies / "run")
        finally:
            os.environ["LLAMAWEFT_CACHE"] = str(self.cache)
            shutil.rmtree(copies)
        self.figures.flips += 1
        named = False
        for (code, found, said), (_, sound, _) in zip(results, self.sound, strict=True):
            assert "Traceback" not in said, f"{where}: {said}"
            errors = " ".join(line for line in said.splitlines() if line.startswith("error: "))
            if code == 0:
                assert found == sound, f"{where} was not found and changes the result"
                named |= target.name in said.replace("\n", "")  # set aside, and said so
            else:
                assert code in (1, 2), f"{where}: exit code {code}"
                assert names(errors, target), f"{where} is not named: {errors}"
                named = True
        self.figures.found += named
        self.figures.harmless += not named
        self.figures.by_file[target.name] = self.figures.by_file.get(target.name, 0) + named


def names(errors: str, path: Path) -> bool:
    """Whether an error says which file is damaged. A list of checksums may accuse a file that it is
    of, in the same folder."""
    lists = ("checksums.json", "store.json")
    return path.name in errors or (path.name in lists and path.parent.name in errors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--flips", type=int, default=3, help="of each file")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    from llamaweft.model.init import init_random

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["LLAMAWEFT_CACHE"] = str(folder / "cache-of-models")
        init_random("tiny", folder / "tiny", "builtin:smollm2-135m", "fp32", seed=1)
        figures = Flipping(folder, folder / "tiny")(given.flips, given.seed)
        print(json.dumps(asdict(figures)))


if __name__ == "__main__":
    main()
