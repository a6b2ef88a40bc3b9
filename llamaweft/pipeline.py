"""Where the rooms meet: hands the pieces of a recipe (pieces.py) to each other.

As a library: `Pipeline(Recipe.load("recipe.yaml")).train()`.
"""

from __future__ import annotations

import json
import shlex
import shutil
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from llamaweft.adapters.folder import (
    adapter_state,
    load_adapter_state,
    read_adapter,
    save_adapter,
)
from llamaweft.adapters.lora import constants, loraplus_ratios
from llamaweft.data.chat import Document, stop_ids
from llamaweft.errors import UserError
from llamaweft.evaluate.evaluator import side_by_side
from llamaweft.evaluate.forgetting import forgetting_notes
from llamaweft.evaluate.report import ReportInput, write_report
from llamaweft.export.hf import export_merged, merged_sources
from llamaweft.files import (
    check_recorded,
    digests,
    flush,
    forget,
    need_disk,
    put_back,
    record,
    recorded,
    take_place,
    write_recorded,
)
from llamaweft.forgetting import build_guard
from llamaweft.judge import Judge, Progress
from llamaweft.measuring import Measuring
from llamaweft.model.llama import Model
from llamaweft.model.load import copy_weights
from llamaweft.model.locate import base_name
from llamaweft.model.pack import Pack
from llamaweft.parallel.agreement import check_same, digest, versions
from llamaweft.parallel.layout import check_model, check_packs
from llamaweft.parallel.methods import check_method
from llamaweft.parallel.ranks import ALONE, Ranks
from llamaweft.parallel.spread import let_go
from llamaweft.pieces.disk import disk_bytes
from llamaweft.plan.flops import training_flops
from llamaweft.plan.memory import Schedule
from llamaweft.plan.plan import Plan
from llamaweft.plan.whole import Whole
from llamaweft.planning import plan_run
from llamaweft.recipe import Recipe
from llamaweft.runtime import seed_everything
from llamaweft.train.checkpoint import (
    STATE,
    LoopState,
    complete_checkpoints,
    set_damaged_aside,
)
from llamaweft.train.events import (
    Announcer,
    Event,
    InterruptedByRequest,
    Listener,
    StopRequest,
)
from llamaweft.train.guard import GuardSettings
from llamaweft.train.in_backward import InBackward
from llamaweft.train.loop import COMPLETE, Loop, exhausted
from llamaweft.train.metrics import MetricsFile, read_metrics
from llamaweft.train.optim import (
    build_optimizer,
    build_scaler,
    check_optimizer_installed,
    trained_parameters,
)
from llamaweft.train.overfitting import OverfittingWatch, find_overfitting
from llamaweft.train.quarantine import QuarantineFile, said_of
from llamaweft.train.run_folder import RunFolder, read_json, write_json
from llamaweft.train.schedule import LearningRate
from llamaweft.train.step import Settings
from llamaweft.train.trackers import Trackers, check_installed


class Pipeline(Measuring):
    """From a recipe to a run folder, and back to the model that was trained."""

    def __init__(self, recipe: Recipe, ranks: Ranks = ALONE) -> None:
        super().__init__(recipe, ranks)
        self.run_folder = RunFolder(Path(recipe.output_dir))
        self.untouched: dict[str, Any] | None = None
        """What was measured of the untouched model, once it was."""

    def train(
        self,
        *,
        resume: bool = False,
        listeners: Sequence[Listener] = (),
        stop: StopRequest | None = None,
        say: Callable[[str], None] = lambda what: None,
        progress: Progress | None = None,
    ) -> dict[str, Any]:
        """Run the recipe, from its data to evaluation.json and the report.

        resume: go on from the newest complete checkpoint, or start if there is none.
        say: told what is going on. progress: (done, of all) answers of an evaluation.
        Returns {"step", "reason", "evaluation"}; the evaluation is None where nothing is held
        out or the run was stopped. Raises UserError for everything that is wrong with recipe,
        data, model or disk, before anything is written.
        """
        turns = self.turns(
            resume=resume, listeners=listeners, stop=stop, say=say, progress=progress
        )
        return exhausted(turns).to_dict()

    def turns(
        self,
        *,
        resume: bool = False,
        listeners: Sequence[Listener] = (),
        stop: StopRequest | None = None,
        say: Callable[[str], None] = lambda what: None,
        progress: Progress | None = None,
        before: dict[str, Any] | None = None,
    ) -> Generator[None, None, RunResult]:
        """`train`, which pauses after each micro-batch: several runs can share a device.

        before: what `measured` gave of the untouched model, where that is known already.
        """
        began = time.perf_counter()
        folder, first = self.run_folder, self.ranks.first
        self.stop = stop or self.stop
        self.stop.of_all = not self.ranks.alone
        plan = self._planned(resume, say)
        say("loading the model")
        self.ranks.on_first(lambda: self.prepare_weights(say))
        if not first:
            self.prepare_weights(lambda what: None)  # on another machine they are not there yet
        seed_everything(self.recipe.training.seed)
        model = self.load_model()
        if first:
            folder.lock()
        try:
            checkpoint = self.ranks.on_first(lambda: self._open_folder(plan, resume))
            judge = Judge(self, model, progress)
            loop = self._loop(model, judge, listeners, began)
            judge.state = lambda: loop.state
            if checkpoint is not None:
                say(f"resuming from {checkpoint.name}")
                check_recorded(folder.forgetting)
                judge.guard = build_guard(self, model, folder.forgetting, resumes=True)
                loop.resume(checkpoint)
                loop.state.schedule = self.schedule.to_dict()
            elif judge.measures:
                if before is None or self.general is not None:
                    say("measuring the untouched model")
                try:
                    with loop.timed("validation"):
                        judge.guard = build_guard(self, model, folder.forgetting, resumes=False)
                        if judge.guard is not None and first:
                            record(folder.forgetting)
                        loop.state.before = self.untouched = judge.untouched(before)
                except InterruptedByRequest as request:  # nothing is there yet to go on from
                    return RunResult(0, str(request))
                if judge.bounded:  # where no evaluation keeps the budget, nothing learnt is kept
                    self.save_trained(model)
                    loop.state.best_step = 0
            return (yield from self._finish(loop, judge, say))
        finally:
            folder.unlock()

    def _planned(self, resume: bool, say: Callable[[str], None]) -> Plan:
        """Check all that a run depends on, and plan it; of several ranks all by the first's plan.
        Raises UserError as `train` does."""
        folder, ranks = self.run_folder, self.ranks
        ranks.on_first(lambda: folder.check_free(resume))
        check_installed(self.recipe.training.report_to)
        check_optimizer_installed(self.recipe.training.optimizer)
        check_method(ranks.layout, self.recipe)
        check_model(ranks.layout, self.config)
        if resume:
            ranks.on_first(lambda: self._set_damaged_aside(say))
        if resume and complete_checkpoints(folder.checkpoints):
            self.initial, self.resumes = None, True  # the checkpoint holds what became of it
        elif self.initial is not None:
            say(f"going on from the adapter {self.initial[0]}")
        say("reading the data")
        ranks.on_first(lambda: len(self.data.examples))  # the others find it in the cache
        self.check_data()
        if not ranks.alone:
            check_same(ranks, self._same_everywhere())
        check_packs(
            ranks.layout, self.recipe.training.gradient_accumulation_steps, self.loader.total_packs
        )
        if resume:
            self._go_on_with_schedule()
        plan = self.plan()
        self.schedule = ranks.from_first(self.schedule)
        need_disk(folder.root, disk_bytes(self), "the run")
        return ranks.from_first(plan)

    def _same_everywhere(self) -> dict[str, str]:
        """What must be the same on every rank, by name, and a digest of it."""
        held = [*self.data.documents, *self.data.validation_documents]
        return {
            "the recipe": digest(self.recipe.model_dump(exclude={"output_dir"}, mode="json")),
            "the data": digest([digest(document.ids.tolist()) for document in held]),
            "the model": digest(self.config.to_dict()),
            "the versions": versions(),
        }

    def _set_damaged_aside(self, say: Callable[[str], None]) -> None:
        """Have a resumed run go on from the newest checkpoint that is sound."""
        folder = self.run_folder
        if not folder.holds_run:
            return
        folder.lock()
        try:
            for kept in (folder.adapter, folder.model):
                put_back(kept)
            for problem in set_damaged_aside(folder.checkpoints):
                say(f"{problem}; going on from the checkpoint before it")
        finally:
            folder.unlock()

    def _go_on_with_schedule(self) -> None:
        """Take the Schedule of the newest checkpoint, where the budget still allows it and it says
        all that a Schedule says today; kept or recomputed, the numbers are the same."""
        for checkpoint in complete_checkpoints(self.run_folder.checkpoints)[-1:]:
            stored = read_json(checkpoint / STATE).get("schedule")
            try:
                if stored and stored["peak_bytes"] <= self.budget_bytes:
                    self.schedule = Schedule.from_dict(stored) or self.schedule
            except (KeyError, TypeError):  # one that makes no sense is not gone on with
                continue

    def plan(self) -> Plan:
        """Memory, time and decisions, before the start."""
        return plan_run(self)

    def _open_folder(self, plan: Plan, resume: bool) -> Path | None:
        """Write what a run starts with, or check it against the run that goes on."""
        folder, text = self.run_folder, self.recipe.dump()
        if resume and folder.holds_run:
            check_recorded(folder.recipe)
            changes = Recipe.load(folder.recipe).changes(Recipe.load_text(text))
            refused = [str(change) for change in changes if not change.allowed]
            if refused:
                raise UserError(
                    f"--resume goes on with the recipe in {folder.recipe}, and a run cannot go on "
                    f"with other values of {'; '.join(refused)}; change them back, or start a new "
                    "run in another output_dir"
                )
            for change in changes:
                if change.key != "output_dir":
                    self.say(f"going on with {change}, which a resumed run may change")
        write_recorded(folder.recipe, text)
        for path, content in (
            (folder.environment, self.environment(text)),
            (folder.audit, self.data.audit.to_dict()),
            (folder.plan, plan.to_dict()),
        ):
            if not path.exists():  # else the run was started before
                write_json(path, content)
                record(path)
        newest = complete_checkpoints(folder.checkpoints)[-1:]
        return newest[0] if newest else None

    def _loop(
        self,
        model: Model,
        judge: Judge,
        listeners: Sequence[Listener],
        began: float,
    ) -> Loop:
        training, measuring = self.recipe.training, self.recipe.evaluation
        guard, on_cpu = self.recipe.guard, self.runtime.device.type == "cpu"
        parameters = trained_parameters(model)
        ratio = self.recipe.adapter.loraplus_lr_ratio
        total = self.loader.total_steps
        loop = Loop(
            model=model,
            parameters=parameters,
            constants=constants(model),
            objective=model.loss,
            loader=self.loader,
            optimizer=build_optimizer(
                training.optimizer,
                parameters,
                weight_decay=training.weight_decay,
                betas=(training.adam_beta1, training.adam_beta2),
                eps=training.adam_epsilon,
                rate_ratios=None if ratio is None else loraplus_ratios(parameters, ratio),
            ),
            scaler=build_scaler(self.runtime.device, self.runtime.compute_dtype, self.ranks),
            learning_rate=LearningRate(
                training.learning_rate,
                training.lr_scheduler_type,
                total,
                round(training.warmup_ratio * total),
            ),
            evaluator=judge if judge.measures else None,
            keep_best=judge.keep_best,
            within_budget=judge.within_budget,
            useful_flops=self._useful_flops,
            settings=Settings(
                checkpoints=self.run_folder.checkpoints,
                checkpoint_every_steps=training.checkpoint_every_steps,
                save_total_limit=training.save_total_limit,
                evaluate_every_steps=measuring.every_steps,
                early_stopping_patience=measuring.early_stopping_patience,
                early_stopping_min_gain=measuring.early_stopping_min_gain,
                max_grad_norm=training.max_grad_norm,
                best_metric=measuring.metrics[0] if self.evaluator is not None else None,
                stops_over_budget=judge.stops_over_budget,
                max_seconds=training.max_seconds,
                memory_budget=training.memory_budget if on_cpu else None,
                guard=GuardSettings(
                    max_skipped_steps=guard.max_skipped_steps,
                    goes_back=guard.then == "back",
                    learning_rate_factor=guard.learning_rate_factor,
                    max_returns=guard.max_returns,
                    loss_spike=guard.loss_spike,
                ),
            ),
            began=began,
            announce=Announcer([*listeners, *self._trackers()] if self.ranks.first else []),
            ranks=self.ranks,
            stop=self.stop,
            device=self.runtime.device,
            state=LoopState(schedule=self.schedule.to_dict()),
        )
        if training.optimizer_in_backward:
            tiling = model.model.tiling
            loop.in_backward = InBackward(loop.optimizer, parameters, lambda: tiling.goes_on)
        return loop

    def _trackers(self) -> list[Listener]:
        names = self.recipe.training.report_to
        return [Trackers(names, self.run_folder.root, self.recipe.flat())] if names else []

    def _useful_flops(self, packs: list[Pack]) -> float:
        tokens, labels = sum(p.tokens for p in packs), sum(p.trained_tokens for p in packs)
        return training_flops(
            self.config,
            tokens,
            labels,
            frozen_base=not self.trains_all,
            whole=self.workload.whole or Whole(),
            outputs=self.workload.head_outputs,
        )

    def _finish(
        self, loop: Loop, judge: Judge, say: Callable[[str], None]
    ) -> Generator[None, None, RunResult]:
        """Run the loop, judge what it kept, and write evaluation.json and the report."""
        folder, first = self.run_folder, self.ranks.first
        if first:
            reason = yield from self._recorded(loop, say)
        else:
            reason = yield from loop.turns()
        self.ranks.barrier()
        result = RunResult(loop.state.step, reason)
        complete = reason in COMPLETE
        if complete and judge.measures:
            if judge.best is None:  # it was found before a resume, or is the untouched model
                say("measuring the best weights")
                self.restore(judge.model)
                try:
                    judge.best = judge.measured_with_guard()
                except InterruptedByRequest as request:  # the resumed run measures them
                    return RunResult(loop.state.step, str(request))
            result.evaluation = side_by_side(loop.state.before, judge.best)
            if judge.guard is not None:
                result.evaluation["forgetting"] = judge.forgotten(reason)
            result.best = judge.best
            if first:
                write_json(folder.evaluation, result.evaluation)
        if complete and first:
            record(*(path for path in folder.growing if path.exists()))
            write_run_report(folder)
        return result

    def _recorded(self, loop: Loop, say: Callable[[str], None]) -> Generator[None, None, str]:
        """Run the loop, and write down what it tells."""
        folder, state = self.run_folder, loop.state
        for grows in folder.growing:
            check_recorded(grows)
            forget(grows)
        metrics = MetricsFile(folder.metrics, state.step, validation_comes=state.validation_due)
        watch = OverfittingWatch(say, read_metrics(folder.metrics))
        quarantine = QuarantineFile(folder.quarantine, self._in_quarantine, state.guard.records)
        loop.announce.listeners[:0] = [metrics, watch, quarantine, _teller(say)]
        try:
            return (yield from loop.turns())
        finally:
            metrics.close()

    def _in_quarantine(self, document: Document) -> dict[str, Any]:
        """What quarantine.jsonl keeps of a document."""
        text = self.tokenizer.decode(document.ids.tolist())
        return {"where": document.where, "tokens": len(document.ids), "text": text}

    # --- what a run leaves ----------------------------------------------------------------------

    def save_trained(self, model: Model) -> None:
        """Put what was trained into the run folder: adapter/, or without one the model/. All ranks
        must call it; the first writes what they hold together."""
        folder, whole = self.run_folder, self.ranks.whole
        let_go(model, self.ranks)
        state = None if self.lora is None else adapter_state(model, whole)
        if not self.ranks.first:
            if self.lora is None:
                for source in merged_sources(model, whole):
                    next(iter(source.chunks(1)))
            self.ranks.barrier()
            return
        target = folder.model if self.lora is None else folder.adapter
        aside = target.with_name(f".{target.name}.new")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        if self.lora is None:
            stops = stop_ids(self.tokenizer)
            export_merged(model, self.tokenizer, aside, "fp32", stops, whole)
        else:
            base = base_name(self.recipe.model, self.model_folder)
            save_adapter(model, self.lora, base, aside, self.model_commit, state)
            if self.new_tokens is not None:  # their rows mean nothing without their names
                self.tokenizer.save_pretrained(aside)
        flush(aside)
        with recorded(target, digests(aside, target.name)):
            take_place(aside, target)
        self.ranks.barrier()

    def restore(self, model: Model) -> None:
        """Load what `save_trained` wrote into a model of this pipeline. Raises UserError where it
        is damaged."""
        folder = self.run_folder
        let_go(model, self.ranks)
        if self.lora is None:
            check_recorded(folder.model)
            copy_weights(folder.model, model, self.ranks.fill)
        else:
            state = read_adapter(folder.adapter)[2]
            load_adapter_state(model, self._own_parts(state), str(folder.adapter))

    def _own_parts(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """What this rank holds of an adapter's tensors."""
        return {
            name: self.ranks.part(
                name.removeprefix("base_model.model.").removesuffix(".weight"), tensor
            )
            for name, tensor in state.items()
        }

    def trained_model(self) -> Model:
        """The model that the run trained. Raises UserError when there is none yet."""
        folder = self.run_folder
        if not (folder.model if self.lora is None else folder.adapter).exists():
            raise UserError(
                f"the run {folder.root} has no trained weights yet; go on with "
                f"`llamaweft train {shlex.quote(str(folder.recipe))} --resume`"
            )
        if self.trains_all and self.head is None:
            check_recorded(folder.model)
            return self.load_frozen(folder.model)
        model = self.adapted(self.load_to_train())
        self.restore(model)
        return model.eval()


@dataclass
class RunResult:
    """How a run ended. evaluation: the content of evaluation.json, or None where nothing is held
    out or the run was stopped. best: what `Judge.measured` gave of the weights that were kept."""

    step: int
    reason: str
    evaluation: dict[str, Any] | None = None
    best: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {"step": self.step, "reason": self.reason, "evaluation": self.evaluation}


def open_run(name: str | Path) -> Pipeline | None:
    """The pipeline of a run folder, or None where `name` is not one."""
    folder = Path(name)
    if not (folder / "recipe.yaml").is_file():
        return None
    check_recorded(folder / "recipe.yaml")
    recipe = Recipe.load(folder / "recipe.yaml", [f"output_dir={json.dumps(str(folder))}"])
    return Pipeline(recipe)


def write_run_report(folder: RunFolder) -> None:
    """report.html and report.md from the files of a run folder."""
    found = sorted(folder.root.glob("evaluation*.json"), key=lambda path: path.stem)
    check_recorded(*folder.growing, folder.recipe, folder.environment, folder.audit, folder.plan)
    records = read_metrics(folder.metrics)
    overfits = find_overfitting(records)
    weights = "adapter/" if folder.adapter.exists() else "model/"
    forgotten = forgetting_notes(read_json(folder.evaluation).get("forgetting"), weights)
    write_report(
        ReportInput(
            title=folder.root.resolve().name,
            command=f"llamaweft train {shlex.quote(str(folder.recipe))} output_dir=NEW_FOLDER",
            recipe_yaml=folder.recipe.read_text(encoding="utf-8"),
            environment=read_json(folder.environment),
            audit=read_json(folder.audit),
            plan=read_json(folder.plan),
            metrics=records,
            evaluations=[read_json(path) for path in found],
            notes=[*([str(overfits)] if overfits else []), *forgotten],
        ),
        folder.report_html,
        folder.report_md,
    )


def _teller(say: Callable[[str], None]) -> Listener:
    """A listener that tells what the guard did."""

    def tell(event: Event) -> None:
        if (said := said_of(event)) is not None:
            say(said)

    return tell
