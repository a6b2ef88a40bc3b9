"""One process of a proof: a run that writes down the order of its rows, and that is killed, or
asked to stop, at a place that it is told."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any

from torch import Tensor

from llamaweft.errors import RunError, UserError
from llamaweft.judge import Judge
from llamaweft.model.llama import Model
from llamaweft.pieces.disk import disk_bytes
from llamaweft.pipeline import Pipeline
from llamaweft.plan.plan import Plan
from llamaweft.recipe import Recipe
from llamaweft.runtime import seed_everything
from llamaweft.sweep import Sweep
from llamaweft.train.events import CheckpointSaved, Event, Listener, StepEnded
from llamaweft.train.loop import Loop
from llamaweft.train.run_folder import RunFolder

DONE = "verified"
"""Why a run of a proof stops when all its steps are taken."""


@dataclass(frozen=True)
class Cut:
    """Where a run is cut short: in the pack with this index of an optimizer step (counted from 1),
    after its forward pass; without a pack, when that step is saved. sign: the signal."""

    step: int
    pack: int | None
    sign: signal.Signals = signal.SIGKILL


class Part(Pipeline):
    """A run of a proof. until: the optimizer step after which it stops; None: at its own end.
    given_plan: its plan, where that is made already, so that the machine is measured once."""

    def __init__(
        self,
        recipe: Recipe,
        cut: Cut | None = None,
        until: int | None = None,
        given_plan: Plan | None = None,
    ) -> None:
        super().__init__(recipe)
        self.cut, self.until, self.given_plan = cut, until, given_plan

    def plan(self) -> Plan:
        if self.given_plan is None:
            return super().plan()
        _ = self.schedule  # raises UserError where nothing fits
        return self.given_plan

    @property
    def run_bytes(self) -> int:
        """What the run folder may take."""
        return disk_bytes(self)

    def begin(self, folders: dict[int, Path]) -> None:
        """Make a run folder for each number of steps, with a checkpoint as if so many steps had
        been taken and had changed nothing: `train(resume=True)` goes on from there."""
        self.check_data()
        plan = self.plan()
        self.prepare_weights(lambda what: None)
        seed_everything(self.recipe.training.seed)
        model = self.load_model()
        for step, folder in folders.items():
            self.run_folder = RunFolder(folder)
            self.run_folder.lock()
            try:
                self._open_folder(plan, resume=False)
                judge = Judge(self, model, None)
                loop = super()._loop(model, judge, [], time.perf_counter())
                loop.state.step = step
                loop._save()
            finally:
                self.run_folder.unlock()

    def rows_in_order(self, start: int, steps: int) -> dict[tuple[int, int], str]:
        """The rows of each (step, pack) of so many steps after `start` finished ones: the packs are
        counted from the first one of the first epoch, as a run that never began elsewhere would."""
        loader, accumulation = self.loader, self.recipe.training.gradient_accumulation_steps
        every = (
            pack
            for epoch in count()
            for window in range(len(loader._windows(epoch)))
            for pack in loader._packs_of(epoch, window)
        )
        first, last = start * accumulation, (start + steps) * accumulation
        found = {}
        for number, taken in enumerate(islice(every, first, last), start=first):
            pack = loader.collate([loader.documents[index] for index in taken.documents])
            found[number // accumulation + 1, number % accumulation] = rows_of(pack)
        return found

    def _loop(
        self, model: Model, judge: Judge, listeners: Sequence[Listener], began: float
    ) -> Loop:
        loop = super()._loop(model, judge, [*listeners, self._told], began)
        loop.objective = self._watched(loop)
        return loop

    def _told(self, event: Event) -> None:
        match event:
            case StepEnded(step=step) if step == self.until:
                self.stop(DONE)
            case CheckpointSaved(step=step) if self.cut == Cut(step, None):
                os.kill(os.getpid(), signal.SIGKILL)

    def _watched(self, loop: Loop) -> Callable[[Any], tuple[Tensor, Tensor]]:
        """The loop's objective, which first writes a line of the order."""
        objective, path = loop.objective, order_file(self.run_folder.root)

        def watched(pack: Any) -> tuple[Tensor, Tensor]:
            step, index = loop.state.step + 1, loop.state.packs_done
            with path.open("a", encoding="utf-8") as file:
                line = {"step": step, "pack": index, "process": os.getpid(), "rows": rows_of(pack)}
                file.write(json.dumps(line) + "\n")
            found = objective(pack)
            if self.cut is not None and (step, index) == (self.cut.step, self.cut.pack):
                os.kill(os.getpid(), self.cut.sign)
            return found

        return watched


def rows_of(pack: Any) -> str:
    """A hash of a pack's tokens."""
    return hashlib.sha256(pack.ids_T.cpu().numpy().tobytes()).hexdigest()


def order_file(run_folder: Path) -> Path:
    """Where a run writes which packs it computed: beside its folder."""
    return run_folder.with_name(f"{run_folder.name}.order.jsonl")


@dataclass(frozen=True)
class Task:
    """What a process does with a recipe (as text, with `output_dir` of its own). begin: folders to
    make, by steps; else the run, or with axes a sweep whose second run is cut. given_plan: the plan
    of the run."""

    recipe: str
    begin: dict[int, Path] = field(default_factory=dict)
    resume: bool = True
    until: int | None = None
    cut: Cut | None = None
    axes: dict[str, list[str]] | None = None
    given_plan: Plan | None = None


def do(task: Task, connection: Connection) -> None:
    """Do it, and send (exit code, what was said): 0 and why the run ended, or an error's sentence.
    A killed process sends nothing."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that proves ends this one
    os.dup2(2, 1)  # what libraries print is no part of a JSON document
    try:
        connection.send((0, _done(task)))
    except UserError as error:
        connection.send((2, str(error)))
    except RunError as error:
        connection.send((1, str(error)))


def _done(task: Task) -> str:
    recipe = Recipe.load_text(task.recipe)
    if task.axes is not None:
        return _swept(recipe, task)
    part = Part(recipe, task.cut, task.until, task.given_plan)
    if task.begin:
        part.begin(task.begin)
        return "begun"
    _stop_on_signal(part)
    return str(part.train(resume=task.resume)["reason"])


def _swept(recipe: Recipe, task: Task) -> str:
    assert task.axes is not None
    sweep = Sweep(recipe, task.axes)
    for number, run in enumerate(sweep.runs, start=1):
        run.pipeline = Part(run.pipeline.recipe, task.cut if number == 2 else None)
    sweep.train(resume=task.resume)
    return "finished"


def _stop_on_signal(part: Part) -> None:
    def on_signal(number: int, frame: FrameType | None) -> None:
        part.stop(signal.Signals(number).name)

    signal.signal(signal.SIGTERM, on_signal)
