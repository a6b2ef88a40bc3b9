"""Where the rooms meet: builds the pieces that a recipe names and hands them to each other.

As a library: `Pipeline(Recipe.load("recipe.yaml")).train()`.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from llamaweft.adapters.folder import load_adapter_state, read_adapter, save_adapter
from llamaweft.adapters.lora import LAYER_LINEARS, LoraConfig, inject
from llamaweft.data.chat import Document, stop_ids
from llamaweft.data.formats import Example
from llamaweft.data.loader import Loader
from llamaweft.data.prepare import Preparation, Prepared
from llamaweft.errors import UserError
from llamaweft.evaluate.evaluator import Evaluator, side_by_side
from llamaweft.evaluate.report import ReportInput, write_report
from llamaweft.export.hf import export_merged
from llamaweft.files import need_disk
from llamaweft.model.folder import base_name, find_folder, read_config
from llamaweft.model.llama import LlamaForCausalLM, Memory
from llamaweft.model.load import copy_weights, load_causal_lm
from llamaweft.model.pack import Pack
from llamaweft.model.presets import LlamaConfig, parameter_count
from llamaweft.model.stores import cached_store, open_store, own_codec, store_bytes
from llamaweft.model.tokenizer import load_tokenizer
from llamaweft.plan.flops import training_flops
from llamaweft.plan.hardware import available_bytes, matmul_flops_per_second
from llamaweft.plan.memory import Schedule, Workload, solve, trained_parameter_count
from llamaweft.plan.plan import Plan, make_plan
from llamaweft.recipe import Evaluation, Recipe
from llamaweft.runtime import (
    Runtime,
    anon_bytes,
    choose_runtime,
    environment,
    return_freed_memory,
    seed_everything,
)
from llamaweft.train.checkpoint import STATE, LoopState, complete_checkpoints
from llamaweft.train.events import Announcer, Listener, StopRequest
from llamaweft.train.loop import EARLY_STOPPING, FINISHED, Loop, Settings
from llamaweft.train.metrics import MetricsFile, read_metrics
from llamaweft.train.optim import (
    build_optimizer,
    build_scaler,
    check_optimizer_installed,
    optimizer_bytes_per_parameter,
    trained_parameters,
)
from llamaweft.train.run_folder import RunFolder, read_json, write_json, write_text
from llamaweft.train.schedule import LearningRate
from llamaweft.train.trackers import Trackers, check_installed

Progress = Callable[[int, int], None]


class Pipeline:
    """A recipe and the pieces it names, each built when it is first asked for."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.run_folder = RunFolder(Path(recipe.output_dir))

    # --- the pieces ---------------------------------------------------------------------------

    @cached_property
    def runtime(self) -> Runtime:
        return choose_runtime(self.recipe.training.device, self.recipe.training.compute_dtype)

    @cached_property
    def model_folder(self) -> Path:
        return find_folder(self.recipe.model)

    @cached_property
    def config(self) -> LlamaConfig:
        return read_config(self.model_folder)

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.model_folder)

    @property
    def lora(self) -> LoraConfig | None:
        """The adapter, or None for full fine-tuning."""
        adapter = self.recipe.adapter
        if adapter.method == "none":
            return None
        targets = (
            LAYER_LINEARS if adapter.target_modules == "all-linear" else adapter.target_modules
        )
        return LoraConfig(
            adapter.r, adapter.lora_alpha, adapter.lora_dropout, adapter.use_rslora, tuple(targets)
        )

    @property
    def base_weights(self) -> str:
        """The codec that frozen weights are held in; full fine-tuning holds all in fp32."""
        return self._base_weights[0]

    @cached_property
    def _base_weights(self) -> tuple[str, str]:
        """The codec, and the reason for it."""
        if self.lora is None:
            return "fp32", "every weight is trained"
        chosen = self.recipe.base_weights
        if chosen != "auto":
            return chosen, "asked for by the recipe"
        if own := own_codec(self.model_folder):
            return own, "what the model folder holds"
        computed = "fp32" if self.runtime.compute_dtype_name == "fp32" else "bf16"
        if store_bytes(self.config, computed) <= self.free_bytes / 2:
            return computed, "they fit as they are computed with"
        return "nf4", f"in {computed} they would take more than half of what is free"

    @cached_property
    def preparation(self) -> Preparation:
        data = self.recipe.data
        return Preparation(
            tokenizer=self.tokenizer,
            task=self.recipe.task,
            train_on=data.train_on,
            max_length_tokens=data.max_length_tokens,
            on_too_long=data.on_too_long,
            seed=self.recipe.training.seed,
        )

    @cached_property
    def data(self) -> Prepared:
        train = [(rows, rows.weight) for rows in self.recipe.data.train]
        held = self.recipe.data.validation
        fraction = held.fraction if held else None
        return self.preparation.prepare(train, None if fraction else held, fraction)

    @cached_property
    def loader(self) -> Loader[Pack]:
        training = self.recipe.training
        return Loader(
            self.data.documents,
            Pack.from_documents,
            micro_batch_tokens=training.micro_batch_tokens,
            accumulation=training.gradient_accumulation_steps,
            epochs=training.num_train_epochs,
            max_steps=training.max_steps,
            weights=self.data.weights,
            seed=training.seed,
        )

    @cached_property
    def schedule(self) -> Schedule:
        return solve(self.workload, self.budget_bytes)

    @property
    def budget_bytes(self) -> int:
        """Memory that the run may take."""
        return self.recipe.training.memory_budget or self.free_bytes

    def _go_on_with_schedule(self) -> None:
        """Take the Schedule of the newest checkpoint, where the budget still allows it; kept or
        recomputed, the numbers are the same."""
        for checkpoint in complete_checkpoints(self.run_folder.checkpoints)[-1:]:
            stored = read_json(checkpoint / STATE).get("schedule")
            if stored and stored["peak_bytes"] <= self.budget_bytes:
                self.schedule = Schedule.from_dict(stored)

    @cached_property
    def free_bytes(self) -> int:
        return available_bytes(self.runtime.device)

    @cached_property
    def workload(self) -> Workload:
        training, (tokens, labels) = self.recipe.training, self.loader.largest_pack
        on_cpu = self.runtime.device.type == "cpu"
        held = 0 if on_cpu or self.lora is None else store_bytes(self.config, self.base_weights)
        compute_bytes = self.runtime.compute_dtype.itemsize
        fragments = 0 if self._has_large_tensors else FRAGMENT_BYTES
        return Workload(
            config=self.config,
            pack_tokens=tokens,
            labels=labels,
            rank=self.lora.r if self.lora else None,
            targets=tuple(t.rpartition(".")[2] for t in self.lora.target_modules)
            if self.lora
            else (),
            compute_bytes=compute_bytes,
            kept_bytes=2 if training.keep_activations == "bf16" else None,
            runtime_bytes=RUNTIME_BYTES + (anon_bytes() + fragments if on_cpu else 0),
            weight_bytes=held,
            optimizer_bytes=optimizer_bytes_per_parameter(training.optimizer),
            keeps_attention=on_cpu,
            accumulates=training.gradient_accumulation_steps > 1,
        )

    @property
    def _has_large_tensors(self) -> bool:
        """Whether the widest activation is large enough to be worth memory of its own."""
        numbers = self.loader.largest_pack[0] * self.config.intermediate_size
        return numbers * self.runtime.compute_dtype.itemsize >= LARGE_TENSOR_BYTES

    def load_model(self) -> LlamaForCausalLM:
        """The base model with a fresh adapter, on its device."""
        if self.runtime.device.type == "cpu" and self._has_large_tensors:
            return_freed_memory()  # else the peak would exceed the budget
        model = self._load(self.model_folder, frozen=self.lora is not None)
        if self.lora is not None:
            inject(model, self.lora)
        model.model.memory = Memory(
            [frozenset(names) for names in self.schedule.keep],
            self.schedule.mlp_tile_tokens,
            torch.bfloat16 if self.recipe.training.keep_activations == "bf16" else None,
        )
        return model

    def load_frozen(self, folder: Path | None = None) -> LlamaForCausalLM:
        """A model without adapter that is only used: the base, or that of another folder."""
        return self._load(folder or self.model_folder, frozen=True).eval()

    def _load(self, folder: Path, *, frozen: bool) -> LlamaForCausalLM:
        return load_causal_lm(
            folder,
            base_weights=self.base_weights if frozen else None,
            compute_dtype=self.runtime.compute_dtype,
            device=self.runtime.device,
        )

    def prepare_weights(self, say: Callable[[str], None]) -> None:
        """Make the store of the frozen weights, where there is none yet."""
        if self.lora is None:
            return
        folder, codec = self.model_folder, self.base_weights
        if own_codec(folder) is None and not cached_store(folder, codec).exists():
            say(f"converting the weights to {codec}, once")
        open_store(folder, codec)

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
        if not self.data.documents:
            raise UserError("no row is left to train on: data.on_too_long dropped them all")
        if self.evaluator is not None:
            self.evaluator.check()

    # --- plan ---------------------------------------------------------------------------------

    def plan(self) -> Plan:
        """Memory, time and decisions; measures the matmul rate for half a second."""
        documents, training = self.data.documents, self.recipe.training
        tokens = float(self.data.weights @ [len(d.ids) for d in documents])
        labels = float(self.data.weights @ [d.trained_tokens for d in documents])
        packs = self.loader.packs_per_epoch
        packs_per_step = self.loader.total_packs / self.loader.total_steps
        return make_plan(
            self.workload,
            self.schedule,
            steps=self.loader.total_steps,
            mean_step_tokens=tokens / packs * packs_per_step,
            mean_step_labels=labels / packs * packs_per_step,
            packs_per_epoch=packs,
            flops_per_second=matmul_flops_per_second(
                self.runtime.device,
                self.runtime.compute_dtype,
                (training.micro_batch_tokens, self.config.hidden_size, self.config.hidden_size),
            ),
            budget_bytes=self.budget_bytes,
            decisions=self.decisions(),
        )

    def decisions(self) -> dict[str, str]:
        """What was chosen, and why: printed once at the start and saved."""
        runtime = self.runtime
        threads = f"{runtime.threads} threads" if runtime.device.type == "cpu" else ""
        trained = trained_parameter_count(self.workload)
        method = f"LoRA r {self.lora.r}" if self.lora else "full fine-tuning"
        share = self.schedule.recomputed_share
        recompute = (
            "nothing is recomputed: the activations fit the budget"
            if share == 0
            else f"{share:.0%} of the forward pass's products are done again to fit the budget"
        )
        return {
            "model": f"{self.recipe.model}, {parameter_count(self.config) / 1e6:.1f}M parameters",
            "device": " ".join([str(runtime.device), threads]).strip(),
            "compute": f"{runtime.compute_dtype_name}: {runtime.reason}",
            "weights": f"frozen weights held in {self.base_weights}: {self._base_weights[1]}"
            if self.lora
            else "every weight is trained in fp32",
            "trained": f"{method}, {trained / 1e6:.2f}M parameters",
            "recompute": recompute,
        }

    # --- training -----------------------------------------------------------------------------

    @cached_property
    def evaluator(self) -> Evaluator | None:
        """Measures on the held-out rows; None where nothing is held out."""
        if not self.data.validation:
            return None
        return self.evaluator_on(self.data.validation, self.data.validation_documents)

    def evaluator_on(
        self,
        examples: list[Example],
        documents: list[Document],
        measuring: Evaluation | None = None,
    ) -> Evaluator:
        """Measures on these rows as the recipe says, or as `measuring` does."""
        measuring = measuring or self.recipe.evaluation
        return Evaluator(
            metrics=measuring.metrics,
            documents=documents,
            examples=examples,
            tokenizer=self.tokenizer,
            loss_parts=_loss_parts,
            max_rows=measuring.max_rows,
            max_new_tokens=measuring.max_new_tokens,
            micro_batch_tokens=self.recipe.training.micro_batch_tokens,
        )

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
        folder = self.run_folder
        folder.check_free(resume)
        check_installed(self.recipe.training.report_to)
        check_optimizer_installed(self.recipe.training.optimizer)
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
            loop = self._loop(model, judge, listeners, stop or StopRequest())
            if checkpoint is not None:
                say(f"resuming from {checkpoint.name}")
                loop.resume(checkpoint)
                loop.state.schedule = self.schedule.to_dict()
            elif self.evaluator is not None:
                say("measuring the untouched model")
                loop.state.before = judge.measured()
            return self._finish(loop, judge, say)
        finally:
            folder.unlock()

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
        model: LlamaForCausalLM,
        judge: Judge,
        listeners: Sequence[Listener],
        stop: StopRequest,
    ) -> Loop:
        training, measuring = self.recipe.training, self.recipe.evaluation
        parameters = trained_parameters(model)
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
            ),
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
        return training_flops(self.config, tokens, labels, frozen_base=self.lora is not None)

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
        complete = reason in (FINISHED, EARLY_STOPPING)
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

    def save_trained(self, model: LlamaForCausalLM) -> None:
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

    def restore(self, model: LlamaForCausalLM) -> None:
        """Load what `save_trained` wrote into a model of this pipeline."""
        folder = self.run_folder
        if self.lora is None:
            copy_weights(folder.model, model)
        else:
            load_adapter_state(model, read_adapter(folder.adapter)[2], str(folder.adapter))

    def trained_model(self) -> LlamaForCausalLM:
        """The model that the run trained. Raises UserError when there is none yet."""
        folder = self.run_folder
        if not (folder.model if self.lora is None else folder.adapter).exists():
            raise UserError(
                f"the run {folder.root} has no trained weights yet; go on with "
                f"`llamaweft train {shlex.quote(str(folder.recipe))} --resume`"
            )
        if self.lora is None:
            return self.load_frozen(folder.model)
        model = self.load_frozen()
        inject(model, self.lora)
        self.restore(model)
        return model.eval()


class Judge:
    """Measures the model on the held-out rows, and keeps the best weights with their answers."""

    def __init__(
        self, pipeline: Pipeline, model: LlamaForCausalLM, progress: Progress | None
    ) -> None:
        self.pipeline, self.model, self.progress = pipeline, model, progress
        self.latest: dict[str, Any] | None = None
        self.best: dict[str, Any] | None = None

    def measured(self) -> dict[str, Any]:
        """{"metrics": ..., "answers": ...} of the model as it is."""
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
    return model.sequence_losses(Pack.from_documents(documents).to(model.device))


RUNTIME_BYTES = 64 * 2**20
"""What the process takes beyond what it has when the plan is made: compiled kernels, buffers of the
matrix library."""

LARGE_TENSOR_BYTES = 8 * 2**20
"""Widest activation from which on freed memory is given back at once."""

FRAGMENT_BYTES = 96 * 2**20
"""What the C library holds on to otherwise. docs/plan.md has what was measured."""
