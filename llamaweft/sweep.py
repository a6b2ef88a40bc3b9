"""Several adapters on one base: in one process, in turns of a micro-batch, each as if alone.

Every run of a sweep has its own model object, optimizer, order of data, random numbers and run
folder; the frozen weights, the rows and what was measured of the untouched model are there once.
So a run of a sweep equals, bit for bit, the same recipe trained by itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from torch import Tensor

from llamaweft.errors import UserError
from llamaweft.evaluate.bootstrap import compare
from llamaweft.evaluate.curves import lower_is_better
from llamaweft.evaluate.evaluator import parts_name
from llamaweft.evaluate.metrics import score_of
from llamaweft.judge import Progress
from llamaweft.pipeline import Pipeline, RunResult
from llamaweft.plan.memory import trained_parameter_count
from llamaweft.recipe import Recipe
from llamaweft.train.checkpoint import random_state, restore_random_state
from llamaweft.train.events import Listener, StopRequest
from llamaweft.train.optim import optimizer_bytes_per_parameter
from llamaweft.train.run_folder import read_json, write_json

SWEPT = ("adapter.", "training.", "head.")
"""Keys that runs on one base may differ in begin so."""

SHARED = (
    "training.compute_dtype",
    "training.device",
    "training.max_seconds",
    "training.memory_budget",
    "training.report_to",
)
"""But not these: they are the process's."""

SWEEP = "sweep.json"
"""What a sweep leaves beside the folders of its runs."""

LONGEST_NAME = 80


@dataclass
class Run:
    """One run of a sweep. changes: what it alone has, as `{"training.learning_rate": "1e-4"}`.
    random: the state of its random generators between two turns."""

    name: str
    changes: dict[str, str]
    pipeline: Pipeline
    turns: Generator[None, None, RunResult] | None = None
    random: dict[str, Tensor] = field(default_factory=dict)
    result: RunResult | None = None


class Sweep:
    """A recipe, and the keys of which each combination of values is a run."""

    def __init__(self, recipe: Recipe, axes: dict[str, list[str]]) -> None:
        """Raises UserError for a key that runs cannot differ in, for a value that the recipe
        refuses, and where there is nothing to rank the runs by."""
        check_axes(recipe, axes)
        self.recipe, self.axes = recipe, axes
        self.root = Path(recipe.output_dir)
        self.runs = [self._run(i, values) for i, values in enumerate(product(*axes.values()), 1)]

    def _run(self, number: int, values: tuple[str, ...]) -> Run:
        changes = dict(zip(self.axes, values, strict=True))
        name = run_name(number, changes)
        folder = json.dumps(str(self.root / name))
        return Run(
            name, changes, Pipeline(self.recipe.overridden(changes | {"output_dir": folder}))
        )

    def train(
        self,
        *,
        resume: bool = False,
        listeners: Callable[[str], Sequence[Listener]] = lambda name: (),
        stop: StopRequest | None = None,
        say: Callable[[str], None] = lambda what: None,
        progress: Progress | None = None,
    ) -> dict[str, Any]:
        """Train all runs, and write sweep.json: {"axes", "metric", "runs"}, the best run first.

        listeners: those of a run, by its name. The rest is `Pipeline.train`'s. Raises UserError,
        before anything is written, for what is wrong with any of the runs.
        """
        self._check_folder(resume)
        self._share(say)
        self.root.mkdir(parents=True, exist_ok=True)
        write_json(self.root / SWEEP, {"axes": self.axes})
        for run in self.runs:
            run.turns = run.pipeline.turns(
                resume=resume,
                listeners=listeners(run.name),
                stop=stop,
                say=_named(say, run.name),
                progress=progress,
                before=self._untouched(run),
            )
            run.random = random_state()
            self._turn(run)
        while waiting := [run for run in self.runs if run.result is None]:
            for run in waiting:
                self._turn(run)
        content = self.content()
        write_json(self.root / SWEEP, content)
        return content

    def _turn(self, run: Run) -> None:
        """Let a run compute one micro-batch, with the random numbers that it would have alone."""
        assert run.turns is not None
        restore_random_state(run.random)
        try:
            next(run.turns)
        except StopIteration as ended:
            run.result = ended.value
        run.random = random_state()

    def _check_folder(self, resume: bool) -> None:
        if (self.root / SWEEP).exists():
            if not resume:
                raise UserError(
                    f"{self.root} holds another sweep; give another output_dir, or --resume to go "
                    "on with it"
                )
            if read_json(self.root / SWEEP).get("axes") != self.axes:
                raise UserError(
                    f"--resume goes on with the sweep of {self.root / SWEEP}, whose keys and "
                    "values are others; give them again, or another output_dir"
                )
        elif self.root.exists() and any(self.root.glob("[!.]*")):
            raise UserError(f"{self.root} holds other files; give a new or empty output_dir")

    def _share(self, say: Callable[[str], None]) -> None:
        """Give every run the first one's rows and weights, and check that all fit together."""
        first = self.runs[0].pipeline
        say("reading the data")
        for run in self.runs:
            run.pipeline.take_from(first, rows=_same_rows(run, self.runs[0]))
            run.pipeline.check_data()
        states = [_state_bytes(run.pipeline) for run in self.runs]
        for run, own in zip(self.runs, states, strict=True):
            run.pipeline.beside_bytes = sum(states) - own
            del run.pipeline.workload  # it was asked for its own bytes
            _ = run.pipeline.schedule
        say("loading the base")
        first.prepare_weights(say)
        base = first.load_base()
        for run in self.runs:
            run.pipeline.base = base

    def _untouched(self, run: Run) -> dict[str, Any] | None:
        """What the first run measured of the base, where this one would measure the same."""
        first = self.runs[0]
        known = first.pipeline.untouched
        alike = all(one.pipeline.starts_as_base for one in (first, run))
        return known if alike and _same_rows(run, first) else None

    def content(self) -> dict[str, Any]:
        """What sweep.json says of the runs that are there."""
        metric = self.recipe.evaluation.metrics[0]
        done = [run for run in self.runs if run.result is not None]
        sign = 1 if lower_is_better(metric) else -1
        measured = [run for run in done if run.result and run.result.evaluation]
        measured.sort(key=lambda run: sign * _after(run)[metric]["value"])
        stopped = [run for run in done if run not in measured]
        best = measured[0] if measured else None
        return {
            "axes": self.axes,
            "metric": metric,
            "runs": [self._entry(run, best, metric) for run in (*measured, *stopped)],
        }

    def _entry(self, run: Run, best: Run | None, metric: str) -> dict[str, Any]:
        assert run.result is not None
        entry = {
            "folder": str(self.root / run.name),
            "changes": run.changes,
            "step": run.result.step,
            "reason": run.result.reason,
        }
        if run.result.evaluation is None:
            return entry
        entry["metrics"] = _after(run)
        if best is not None and best.result and run is not best and _same_rows(run, best):
            parts = parts_name(metric)
            of_best, own = best.result.best["parts"][parts], run.result.best["parts"][parts]
            lower = lower_is_better(metric)
            found = compare(of_best, own, score_of(metric), lower_is_better=lower)
            entry["difference"] = asdict(found)
        return entry


def check_axes(recipe: Recipe, axes: dict[str, list[str]]) -> None:
    """Raises UserError for a sweep that cannot be."""
    if not any(len(values) > 1 for values in axes.values()):
        raise UserError(
            "--sweep needs a key with several values, as in --sweep "
            "training.learning_rate=1e-4,3e-4"
        )
    for key in axes:
        if not key.startswith(SWEPT) or key in SHARED:
            raise UserError(
                f"--sweep: {key} is what all runs have in common; keys that begin with "
                f"{', '.join(SWEPT)} can differ, except {', '.join(SHARED)}"
            )
    if recipe.data.validation is None:
        raise UserError(
            "--sweep ranks its runs by held-out rows, and data.validation is null; hold some out"
        )
    if others := set(recipe.training.report_to) - {"tensorboard"}:
        raise UserError(
            f"--sweep: training.report_to: {min(others)} takes one run in a process; use "
            "tensorboard, or leave it out"
        )


def split_axes(overrides: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """`key=value` overrides, and the values of those that have several: `adapter.r=8,32`.

    A comma within brackets or quotes does not part values. Raises UserError for a key without a
    value and for an empty value among several.
    """
    fixed: list[str] = []
    axes: dict[str, list[str]] = {}
    for override in overrides:
        key, _, text = override.partition("=")
        values = [value.strip() for value in _PARTS.findall(text)]
        if len(values) < 2 and "," not in re.sub(r"[\[{\"'].*", "", text):
            fixed.append(override)
            continue
        if text.strip().strip(",") != text.strip() or ",," in text:
            raise UserError(f"--sweep: {override!r} has an empty value; remove a comma")
        if len(set(values)) < len(values):
            raise UserError(f"--sweep: {override!r} has a value twice; remove one")
        axes[key] = values
    return fixed, axes


_PARTS = re.compile(r"""(?:\[[^\]]*\]|\{[^}]*\}|"[^"]*"|'[^']*'|[^,])+""")
"""What stands between the commas that part values."""


def run_name(number: int, changes: dict[str, str]) -> str:
    """`02-learning_rate=3e-4-r=32`: a folder's name."""
    said = "-".join(f"{key.rpartition('.')[2]}={value}" for key, value in changes.items())
    return f"{number:02}-{re.sub(r'[^A-Za-z0-9_.=+-]+', '+', said)}"[:LONGEST_NAME]


def _same_rows(run: Run, other: Run) -> bool:
    """Whether both hold out, draw and weigh the same rows."""
    keys = [key for key in run.changes if key == "training.seed" or key.startswith("head.")]
    return all(run.changes[key] == other.changes[key] for key in keys)


def _state_bytes(pipeline: Pipeline) -> int:
    """What a run holds between two turns: weights, gradients and moments of what it trains, and
    what it keeps of the untouched model."""
    optimizer = optimizer_bytes_per_parameter(pipeline.recipe.training.optimizer)
    trained = round((4 + 4 + optimizer) * trained_parameter_count(pipeline.workload))
    return trained + pipeline.workload.forgetting_bytes


def _after(run: Run) -> dict[str, Any]:
    assert run.result is not None
    assert run.result.evaluation is not None
    metrics: dict[str, Any] = run.result.evaluation["after"]["metrics"]
    return metrics


def _named(say: Callable[[str], None], name: str) -> Callable[[str], None]:
    return lambda what: say(f"{name}: {what}")
