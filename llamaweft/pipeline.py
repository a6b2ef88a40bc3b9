"""Where the rooms meet: hands the pieces of a recipe (pieces.py) to each other.

As a library: `Pipeline(Recipe.load("recipe.yaml")).train()`.
"""

from __future__ import annotations

import json
import shlex
import shutil
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from llamaweft.adapters.folder import load_adapter_state, read_adapter, save_adapter
from llamaweft.adapters.lora import loraplus_ratios
from llamaweft.data.audit_page import write_audit_page
from llamaweft.data.chat import Document, stop_ids
from llamaweft.data.example import Example
from llamaweft.data.page_input import page_input
from llamaweft.errors import UserError
from llamaweft.evaluate.evaluator import Evaluator, side_by_side
from llamaweft.evaluate.head_evaluator import HeadEvaluator
from llamaweft.evaluate.report import ReportInput, write_report
from llamaweft.export.hf import export_merged
from llamaweft.files import need_disk, write_text
from llamaweft.model.folder import base_name
from llamaweft.model.llama import LlamaForCausalLM, LlamaWithHead, Model
from llamaweft.model.load import copy_weights
from llamaweft.model.pack import Pack
from llamaweft.pieces import Pieces
from llamaweft.plan.flops import training_flops
from llamaweft.plan.memory import Schedule, trained_parameter_count
from llamaweft.plan.plan import Plan
from llamaweft.planning import plan_run
from llamaweft.recipe import Recipe
from llamaweft.runtime import environment, seed_everything
from llamaweft.settings import Evaluation
from llamaweft.train.checkpoint import STATE, LoopState, complete_checkpoints
from llamaweft.train.events import Announcer, Listener, StopRequest
from llamaweft.train.loop import EARLY_STOPPING, FINISHED, OUT_OF_TIME, Loop, Settings
from llamaweft.train.metrics import MetricsFile, read_metrics
from llamaweft.train.optim import (
    build_optimizer,
    build_scaler,
    check_optimizer_installed,
    optimizer_bytes_per_parameter,
    trained_parameters,
)
from llamaweft.train.run_folder import RunFolder, read_json, write_json
from llamaweft.train.schedule import LearningRate
from llamaweft.train.trackers import Trackers, check_installed

Progress = Callable[[int, int], None]
Measuring = Evaluator | HeadEvaluator


class Pipeline(Pieces):
    """From a recipe to a run folder, and back to the model that was trained."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.run_folder = RunFolder(Path(recipe.output_dir))

    @cached_property
    def evaluator(self) -> Measuring | None:
        """Measures on the held-out rows; None where nothing is held out."""
        if not len(self.data.validation):
            return None
        documents = self.data.validation_documents
        rows = self.data.validation if self.head is None else documents.examples
        return self.evaluator_on(rows, documents)

    def evaluator_on(
        self,
        examples: Sequence[Example],
        documents: Sequence[Document],
        measuring: Evaluation | None = None,
    ) -> Measuring:
        """Measures on these rows as the recipe says, or as `measuring` does. With a head, documents
        and rows stand in the same order."""
        measuring = measuring or self.recipe.evaluation
        if self.head is not None:
            return HeadEvaluator(
                task=self.recipe.task,
                metrics=measuring.metrics,
                documents=documents,
                examples=examples,
                tokenizer=self.tokenizer,
                classes=self.data.classes,
                outputs=self._read,
                micro_batch_tokens=self.recipe.training.micro_batch_tokens,
            )
        return Evaluator(
            metrics=measuring.metrics,
            documents=documents,
            examples=examples,
            tokenizer=self.tokenizer,
            loss_parts=_loss_parts,
            max_rows=measuring.max_rows,
            max_new_tokens=measuring.max_new_tokens,
            micro_batch_tokens=self.recipe.training.micro_batch_tokens,
            cache_bytes=self.cache_bytes,
        )

    def _read(
        self, model: LlamaWithHead, documents: list[Document]
    ) -> list[tuple[Tensor, tuple[float, float]]]:
        share = not model.head.reads_all
        return model.read(Pack.from_documents(documents, share=share).to(model.device))

    def check_data(self) -> None:
        """Raises UserError when the audit blocks training (a line for each finding), when no row
        is left to train on, or when a metric has no held-out row to be measured on."""
        blocking = self.data.audit.blocking
        if blocking:
            raise UserError(
                "\n".join(
                    f"the audit blocks on {f.check}: {f.count} of {self.data.audit.rows} rows, "
                    f"the first {f.examples[0]}: {f.remedy}"
                    for f in blocking
                )
            )
        if not len(self.data.documents):
            raise UserError("no row is left to train on: data.on_too_long dropped them all")
        if self.evaluator is not None:
            self.evaluator.check()

    def write_audit_page(self, path: Path) -> None:
        """The audit and the rows behind it, as a page. Raises UserError when `path` cannot be
        written."""
        packs = self.loader.first_packs if len(self.data.documents) else []
        longest = self.recipe.data.max_length_tokens
        title = ", ".join(rows.name for rows in self.recipe.data.train)
        page = page_input(title, self.data, packs, self.tokenizer, longest)
        write_audit_page(page, path)

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
        began = time.perf_counter()
        folder = self.run_folder
        folder.check_free(resume)
        check_installed(self.recipe.training.report_to)
        check_optimizer_installed(self.recipe.training.optimizer)
        if resume and complete_checkpoints(folder.checkpoints):
            self.initial = None  # the checkpoint holds what became of it
        elif self.initial is not None:
            say(f"going on from the adapter {self.initial[0]}")
        say("reading the data")
        self.check_data()
        if resume:
            self._go_on_with_schedule()
        plan = self.plan()
        need_disk(folder.root, self._disk_bytes(), "the run")
        say("loading the model")
        self.prepare_weights(say)
        seed_everything(self.recipe.training.seed)
        model = self.load_model()
        folder.lock()
        try:
            checkpoint = self._open_folder(plan, resume)
            judge = Judge(self, model, progress)
            loop = self._loop(model, judge, listeners, stop or StopRequest(), began)
            if checkpoint is not None:
                say(f"resuming from {checkpoint.name}")
                loop.resume(checkpoint)
                loop.state.schedule = self.schedule.to_dict()
            elif self.evaluator is not None:
                say("measuring the untouched model")
                with loop.timed("validation"):
                    loop.state.before = judge.measured()
            return self._finish(loop, judge, say)
        finally:
            folder.unlock()

    def _go_on_with_schedule(self) -> None:
        """Take the Schedule of the newest checkpoint, where the budget still allows it and it says
        all that a Schedule says today; kept or recomputed, the numbers are the same."""
        for checkpoint in complete_checkpoints(self.run_folder.checkpoints)[-1:]:
            stored = read_json(checkpoint / STATE).get("schedule")
            if stored and stored["peak_bytes"] <= self.budget_bytes:
                self.schedule = Schedule.from_dict(stored) or self.schedule

    def plan(self) -> Plan:
        """Memory, time and decisions, before the start."""
        return plan_run(self)

    def _disk_bytes(self) -> int:
        """What checkpoints (weights and two moments each), the result and the logs will need."""
        training, trained = self.recipe.training, trained_parameter_count(self.workload)
        each = 4 + optimizer_bytes_per_parameter(training.optimizer)
        checkpoints = int((training.save_total_limit + 1) * each * trained)
        return checkpoints + 2 * 4 * trained + 16 * 2**20

    def _open_folder(self, plan: Plan, resume: bool) -> Path | None:
        """Write what a run starts with, or check it against the run that goes on."""
        folder, text = self.run_folder, self.recipe.dump()
        if resume and folder.holds_run:
            changed = Recipe.load(folder.recipe).changed_keys(Recipe.load_text(text))
            if changed:
                raise UserError(
                    f"--resume goes on with the recipe in {folder.recipe}, and {changed[0]} is "
                    "different now; change it back, or start a new run in another output_dir"
                )
        else:
            write_json(folder.environment, environment(self.runtime))
            write_json(folder.audit, self.data.audit.to_dict())
            write_json(folder.plan, plan.to_dict())
            write_text(folder.recipe, text)
        newest = complete_checkpoints(folder.checkpoints)[-1:]
        return newest[0] if newest else None

    def _loop(
        self,
        model: Model,
        judge: Judge,
        listeners: Sequence[Listener],
        stop: StopRequest,
        began: float,
    ) -> Loop:
        training, measuring = self.recipe.training, self.recipe.evaluation
        parameters = trained_parameters(model)
        ratio = self.recipe.adapter.loraplus_lr_ratio
        total = self.loader.total_steps
        return Loop(
            model=model,
            parameters=parameters,
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
            scaler=build_scaler(self.runtime.device, self.runtime.compute_dtype),
            learning_rate=LearningRate(
                training.learning_rate,
                training.lr_scheduler_type,
                total,
                round(training.warmup_ratio * total),
            ),
            evaluator=judge if self.evaluator else None,
            keep_best=judge.keep_best,
            useful_flops=self._useful_flops,
            settings=Settings(
                checkpoints=self.run_folder.checkpoints,
                checkpoint_every_steps=training.checkpoint_every_steps,
                save_total_limit=training.save_total_limit,
                evaluate_every_steps=measuring.every_steps,
                early_stopping_patience=measuring.early_stopping_patience,
                max_grad_norm=training.max_grad_norm,
                best_metric=measuring.metrics[0],
                max_seconds=training.max_seconds,
            ),
            began=began,
            announce=Announcer([*listeners, *self._trackers()]),
            stop=stop,
            device=self.runtime.device,
            state=LoopState(schedule=self.schedule.to_dict()),
        )

    def _trackers(self) -> list[Listener]:
        names = self.recipe.training.report_to
        return [Trackers(names, self.run_folder.root, self.recipe.flat())] if names else []

    def _useful_flops(self, packs: list[Pack]) -> float:
        tokens, labels = sum(p.tokens for p in packs), sum(p.trained_tokens for p in packs)
        return training_flops(
            self.config,
            tokens,
            labels,
            frozen_base=self.lora is not None,
            outputs=self.workload.head_outputs,
        )

    def _finish(self, loop: Loop, judge: Judge, say: Callable[[str], None]) -> dict[str, Any]:
        """Run the loop, judge what it kept, and write evaluation.json and the report."""
        folder = self.run_folder
        metrics = MetricsFile(folder.metrics, loop.state.step)
        loop.announce.listeners.insert(0, metrics)
        try:
            reason = loop.run()
        finally:
            metrics.close()
        result: dict[str, Any] = {"step": loop.state.step, "reason": reason, "evaluation": None}
        complete = reason in (FINISHED, EARLY_STOPPING, OUT_OF_TIME)
        if complete and self.evaluator is not None:
            if judge.best is None:  # it was found before a resume
                say("measuring the best weights")
                self.restore(judge.model)
                judge.best = judge.measured()
            result["evaluation"] = side_by_side(loop.state.before, judge.best)
            write_json(folder.evaluation, result["evaluation"])
        if complete:
            write_run_report(folder)
        return result

    # --- what a run leaves ----------------------------------------------------------------------

    def save_trained(self, model: Model) -> None:
        """Put the trained weights into the run folder: adapter/, or model/ for full fine-tuning."""
        folder = self.run_folder
        target = folder.model if self.lora is None else folder.adapter
        aside = target.with_name(f".{target.name}.new")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        if self.lora is None:
            export_merged(model, self.tokenizer, aside, "fp32", stop_ids(self.tokenizer))
        else:
            save_adapter(model, self.lora, base_name(self.recipe.model, self.model_folder), aside)
        old = target.with_name(f".{target.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            target.rename(old)
        aside.rename(target)
        shutil.rmtree(old, ignore_errors=True)

    def restore(self, model: Model) -> None:
        """Load what `save_trained` wrote into a model of this pipeline."""
        folder = self.run_folder
        if self.lora is None:
            copy_weights(folder.model, model)
        else:
            load_adapter_state(model, read_adapter(folder.adapter)[2], str(folder.adapter))

    def trained_model(self) -> Model:
        """The model that the run trained. Raises UserError when there is none yet."""
        folder = self.run_folder
        if not (folder.model if self.lora is None else folder.adapter).exists():
            raise UserError(
                f"the run {folder.root} has no trained weights yet; go on with "
                f"`llamaweft train {shlex.quote(str(folder.recipe))} --resume`"
            )
        if self.lora is None and self.head is None:
            return self.load_frozen(folder.model)
        model = self.adapted(self._load(self.model_folder, frozen=self.lora is not None))
        self.restore(model)
        return model.eval()


class Judge:
    """Measures the model on the held-out rows, and keeps the best weights with their answers."""

    def __init__(self, pipeline: Pipeline, model: Model, progress: Progress | None) -> None:
        self.pipeline, self.model, self.progress = pipeline, model, progress
        self.latest: dict[str, Any] | None = None
        self.best: dict[str, Any] | None = None

    def measured(self) -> dict[str, Any]:
        """{"metrics": ..., "answers": ..., "parts": ...} of the model as it is."""
        assert self.pipeline.evaluator is not None
        return self.pipeline.evaluator.measure(self.model, self.progress)

    def __call__(self) -> dict[str, dict[str, float]]:
        self.latest = self.measured()
        return self.latest["metrics"]

    def keep_best(self) -> None:
        self.best = self.latest
        self.pipeline.save_trained(self.model)


def open_run(name: str | Path) -> Pipeline | None:
    """The pipeline of a run folder, or None where `name` is not one."""
    folder = Path(name)
    if not (folder / "recipe.yaml").is_file():
        return None
    recipe = Recipe.load(folder / "recipe.yaml", [f"output_dir={json.dumps(str(folder))}"])
    return Pipeline(recipe)


def write_run_report(folder: RunFolder) -> None:
    """report.html and report.md from the files of a run folder."""
    found = sorted(folder.root.glob("evaluation*.json"))
    write_report(
        ReportInput(
            title=folder.root.resolve().name,
            command=f"llamaweft train {shlex.quote(str(folder.recipe))} output_dir=NEW_FOLDER",
            recipe_yaml=folder.recipe.read_text(encoding="utf-8"),
            environment=read_json(folder.environment),
            audit=read_json(folder.audit),
            plan=read_json(folder.plan),
            metrics=read_metrics(folder.metrics),
            evaluations=[read_json(path) for path in found],
        ),
        folder.report_html,
        folder.report_md,
    )


def _loss_parts(model: LlamaForCausalLM, documents: list[Document]) -> list[tuple[float, float]]:
    return model.sequence_losses(Pack.from_documents(documents, share=True).to(model.device))
