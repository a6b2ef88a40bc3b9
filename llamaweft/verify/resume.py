"""The proof that a run which was interrupted and resumed is one that never was: on this machine,
with this recipe and its data, bit for bit.

Every run is a process of its own, so that a kill is a kill. Runs begin in the midst of the data,
with a checkpoint as if the steps before it had changed nothing.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llamaweft.errors import RunError, UserError
from llamaweft.files import need_disk
from llamaweft.plan.plan import Plan
from llamaweft.recipe import Recipe
from llamaweft.sweep import Sweep
from llamaweft.train.checkpoint import complete_checkpoints
from llamaweft.verify.compare import Comparison, compare_runs, said
from llamaweft.verify.part import DONE, Cut, Part, Task, do

Say = Callable[[str], None]

IMPORTED_ONCE = [
    "llamaweft.verify.part",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.configuration_llama",
]
"""What the process holds that those of the runs are copies of."""


@dataclass(frozen=True)
class Case:
    """A way to be interrupted. start: steps before it, that are not computed. saved: the checkpoint
    that the resumed run must go on from. cut: None where there is nothing to interrupt in."""

    name: str
    interrupted: str
    start: int
    saved: str
    cut: Cut | None = None


# --- where to interrupt -------------------------------------------------------------------------


def starts(packs_per_epoch: int, accumulation: int, steps: int) -> tuple[int, int]:
    """Finished steps at which 2 * steps begin that lie within the first epoch, where it is long
    enough; and at which they begin so that it ends in the last one before the interruption."""
    within = max(0, (packs_per_epoch // accumulation - 2 * steps) // 2)
    end = -(-packs_per_epoch // accumulation)  # the step in which the epoch ends
    return within, max(0, end - steps)


def cases(packs_per_epoch: int, accumulation: int, steps: int) -> list[Case]:
    """At a step's end, in the midst of an accumulation, and across the end of an epoch."""
    within, across = starts(packs_per_epoch, accumulation, steps)
    fits = (within + 2 * steps) * accumulation <= packs_per_epoch
    inside = "within an epoch" if fits else f"across epochs ({packs_per_epoch} packs each)"
    first, second, last = within + steps, within + steps + 1, across + steps + 1
    stopped, killed = (accumulation - 1) // 2, accumulation // 2
    midst = Case(f"in a step, {inside}", "one pack a step", within, "")
    if accumulation > 1:
        midst = Case(
            f"in a step, {inside}",
            f"SIGTERM in pack {stopped + 1} of {accumulation} of step {second}, which saves there",
            within,
            f"step-{first:06d}-pack-{stopped + 1:03d}",
            Cut(second, stopped, signal.SIGTERM),
        )
    return [
        Case(
            f"between steps, {inside}",
            f"SIGKILL after step {first}",
            within,
            f"step-{first:06d}",
            Cut(first, None),
        ),
        midst,
        Case(
            "after the end of an epoch",
            f"SIGKILL in pack {killed + 1} of {accumulation} of step {last}",
            across,
            f"step-{last - 1:06d}",
            Cut(last, killed),
        ),
    ]


def adjusted(recipe: Recipe, changes: dict[str, str]) -> Recipe:
    """The recipe with a checkpoint after each step and nothing measured between: neither changes
    what a step computes."""
    usual = {
        "training.checkpoint_every_steps": "1",
        "training.save_total_limit": "1",
        "training.max_seconds": "null",
        "training.report_to": "[]",
    }
    if recipe.data.validation is not None:
        usual["evaluation.every_steps"] = "null"
    return recipe.model_copy(update={"forgetting": None}).overridden(usual | changes)


# --- the proofs ---------------------------------------------------------------------------------


def verify_resume(recipe: Recipe, steps: int = 2, say: Say = lambda what: None) -> dict[str, Any]:
    """Prove 2k steps = k steps + interruption + resume + k steps, k = `steps`, in three cases.

    Returns {"passed", "steps", "folder", "cases"}; the folder holds both runs of a case that
    failed, and is None where none did. say: told what is going on. Raises UserError for everything
    that is wrong with recipe, data, model or disk, RunError where a process did not end as it
    should.
    """
    part = Part(adjusted(recipe, {}))
    part.check_data()
    accumulation = recipe.training.gradient_accumulation_steps
    wanted = cases(part.loader.packs_per_epoch, accumulation, steps)
    needed = max(case.start for case in wanted) + 2 * steps + 1  # the last step would be measured
    changes = {}
    if (length := part.loader.total_steps) < needed:
        changes["training.max_steps"] = str(needed)
        say(f"the recipe ends after {length} steps; it is run as with training.max_steps: {needed}")
    begun = sorted({case.start for case in wanted})
    done = [case for case in wanted if case.cut is not None]
    plan = _announce(say, part, 2 * steps * (len(begun) + len(done)))
    with _workplace(Path(recipe.output_dir), 3 * part.run_bytes) as place:
        fresh = {start: place.folder / f"from-{start}" for start in begun}

        def task_in(folder: Path, until: int | None = None) -> Task:
            return Task(_text(adjusted(recipe, changes), folder), until=until, given_plan=plan)

        _expect(replace(task_in(place.folder), begin=fresh), "begun")
        for start, folder in fresh.items():
            whole = place.copied(folder, f"whole-from-{start}")
            here = [case for case in done if case.start == start]
            say(f"steps {start + 1} to {start + 2 * steps}, uninterrupted")
            _expect(task_in(whole, start + 2 * steps), DONE)
            expected = part.rows_in_order(start, 2 * steps)
            for case in here:
                say(f"{case.name}: {case.interrupted}")
                resumed = place.copied(folder, f"resumed-{wanted.index(case) + 1}")
                task = task_in(resumed, start + 2 * steps)
                _interrupt(task, case, resumed)
                _expect(task, DONE)
                place.found(case.name, compare_runs(whole, resumed, start, expected), resumed)
            place.done_with(whole, folder)
        found = [_entry(case, place.comparisons.get(case.name)) for case in wanted]
    return place.content(steps, found)


def verify_sweep_resume(
    recipe: Recipe, axes: dict[str, list[str]], steps: int = 2, say: Say = lambda what: None
) -> dict[str, Any]:
    """The same for a sweep, from its start to its end after 2k steps: killed in the midst of a step
    of its second run, while the first one is in its step too. A case for each run."""
    if "training.max_steps" in axes:
        raise UserError("--sweep: training.max_steps is what the proof sets; leave it out")
    changed = adjusted(recipe, {"training.max_steps": str(2 * steps)})
    runs = [run.pipeline.recipe for run in Sweep(changed, axes).runs]
    parts = [Part(one) for one in runs]
    _announce(say, parts[0], 4 * steps * len(runs))
    size = 2 * sum(part.run_bytes for part in parts)
    accumulation = runs[1].training.gradient_accumulation_steps
    cut = Cut(steps + 1, accumulation // 2)
    interrupted = f"SIGKILL in pack {accumulation // 2 + 1} of {accumulation} of step {cut.step} "
    interrupted += "of run 2"
    with _workplace(Path(recipe.output_dir), size) as place:
        whole, resumed = place.folder / "whole", place.folder / "resumed"
        say("the sweep, uninterrupted")
        _expect(Task(_text(changed, whole), resume=False, axes=axes), "finished")
        say(f"the sweep, interrupted: {interrupted}")
        task = Task(_text(changed, resumed), axes=axes, cut=cut)
        names = [Path(one.output_dir).name for one in runs]
        case = Case("", interrupted, 0, f"step-{steps:06d}", cut)
        _interrupt(task, case, resumed / names[1])
        _expect(Task(task.recipe, axes=axes), "finished")
        for name in names:
            place.found(name, compare_runs(whole / name, resumed / name, 0))
        found = [
            _entry(Case(name, interrupted, 0, "", cut), place.comparisons[name]) for name in names
        ]
    return place.content(steps, found)


def _entry(case: Case, comparison: Comparison | None) -> dict[str, Any]:
    entry: dict[str, Any] = {"case": case.name, "interrupted": case.interrupted}
    if comparison is None:
        return entry | {"passed": None, "not_applicable": case.interrupted}
    return entry | {"start_step": case.start} | said(comparison)


def _announce(say: Say, part: Part, steps: int) -> Plan:
    plan = part.plan()
    say(
        f"the proof takes about {steps} optimizer steps, and by the plan "
        f"{max(1, round(steps * plan.seconds_per_step))} s, beside loading the model for each run"
    )
    return plan


# --- the runs -----------------------------------------------------------------------------------


class Workplace:
    """A folder for the runs of a proof, gone after it unless runs differ."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.comparisons: dict[str, Comparison] = {}

    @property
    def passed(self) -> bool:
        return not any(found.differences for found in self.comparisons.values())

    def copied(self, run: Path, name: str) -> Path:
        """Another run folder that begins as `run` does. Its files are never changed in place, so
        they are there once."""
        target = self.folder / name
        shutil.copytree(run, target, copy_function=_linked, ignore=shutil.ignore_patterns(".lock"))
        return target

    def found(self, name: str, comparison: Comparison, resumed: Path | None = None) -> None:
        self.comparisons[name] = comparison
        if resumed is not None and not comparison.differences:
            shutil.rmtree(resumed)

    def done_with(self, *runs: Path) -> None:
        if self.passed:
            for run in runs:
                shutil.rmtree(run)

    def content(self, steps: int, cases: list[dict[str, Any]]) -> dict[str, Any]:
        kept = None if self.passed else str(self.folder)
        return {"passed": self.passed, "steps": steps, "folder": kept, "cases": cases}


@contextmanager
def _workplace(beside: Path, needed_bytes: int) -> Iterator[Workplace]:
    """Raises UserError where the disk of the run folder has no room for it."""
    need_disk(beside, needed_bytes, "the proof")
    try:
        beside.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f"{beside.name}.verify-", dir=beside.parent))
    except OSError as error:
        raise UserError(f"{beside.parent} cannot be written: {error.strerror}") from None
    place = Workplace(folder)
    try:
        yield place
    finally:
        if place.passed:
            shutil.rmtree(folder, ignore_errors=True)


def _linked(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # this file system has no links
        shutil.copy2(source, target)


def _text(recipe: Recipe, output_dir: Path) -> str:
    return recipe.overridden({"output_dir": json.dumps(str(output_dir.resolve()))}).dump()


def _interrupt(task: Task, case: Case, run: Path) -> None:
    """Run until it is cut short. Raises RunError where it was not, or saved something else."""
    assert case.cut is not None
    exit_code, reason = _process(replace(task, cut=case.cut))
    newest = complete_checkpoints(run / "checkpoints")[-1:]
    dead = case.cut.sign == signal.SIGKILL and exit_code == -signal.SIGKILL
    if not (dead or reason == case.cut.sign.name) or [folder.name for folder in newest] != [
        case.saved
    ]:
        saved = newest[0].name if newest else "nothing"
        raise RunError(
            f"the proof could not interrupt the run as it meant to ({case.interrupted}): it ended "
            f"with {reason or exit_code} and {saved} saved, where {case.saved} was expected"
        )


def _expect(task: Task, reason: str) -> None:
    exit_code, found = _process(task)
    if found != reason:
        raise RunError(f"a run of the proof ended with {found or f'exit code {exit_code}'}")


def _process(task: Task) -> tuple[int | None, str]:
    """Do it in a process of its own: (exit code, why the run ended), the latter empty for one that
    was killed. Raises what ended the run there.

    The processes are copies of one that has imported everything and computed nothing.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED_ONCE)
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=do, args=(task, there), daemon=True)
    process.start()
    there.close()
    try:
        code, ended = here.recv()
    except EOFError:
        code, ended = 0, ""
    except BaseException:
        process.kill()
        raise
    finally:
        here.close()
    process.join()
    if code:
        raise (UserError if code == 2 else RunError)(ended)
    return process.exitcode, ended
