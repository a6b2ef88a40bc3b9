"""A run or a model, opened for use: measured, compared, exported, talked to.

`pipeline.py` leads from a recipe to a run; this leads from a run, an adapter folder or a model
to what a person does with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamaweft.adapters.folder import (
    CONFIG,
    base_revision,
    load_adapter_state,
    read_adapter,
)
from llamaweft.adapters.lora import inject
from llamaweft.adapters.whole import train_whole
from llamaweft.data.example import Example
from llamaweft.data.sources import PlainSource
from llamaweft.data.targets import HEAD_TASKS
from llamaweft.errors import RunError, UserError
from llamaweft.evaluate.evaluator import Progress, side_by_side
from llamaweft.export.parity import Parity
from llamaweft.exports import Export, Wanted
from llamaweft.files import written_aside
from llamaweft.model.head_config import HEAD_NAMES
from llamaweft.model.llama import LlamaForCausalLM, LlamaWithHead, Model
from llamaweft.model.locate import find_folder
from llamaweft.model.tokenizer import load_tokenizer
from llamaweft.pieces.given import adapter_tokens
from llamaweft.pipeline import Pipeline, open_run
from llamaweft.recipe import Recipe
from llamaweft.settings import Evaluation, NewToken, fitting_metric, known_metric
from llamaweft.train.run_folder import write_json

SYSTEM_ROWS = 1000
"""The system message that so many rows begin with is the usual one."""


@dataclass(frozen=True)
class Subject:
    """A model in memory, and the pipeline that knows its tokenizer and settings."""

    name: str
    pipeline: Pipeline
    model: Model

    def measure(
        self, examples: Sequence[Example], measuring: Evaluation, progress: Progress | None
    ) -> dict[str, Any]:
        """{"metrics", "answers", "parts"} on these rows. Raises UserError as Evaluator.check."""
        classes = None if self.pipeline.head is None else self.pipeline.data.classes
        pairs = self.pipeline.preparation.held_out(examples, classes)
        documents = [document for _, document in pairs]
        if self.pipeline.head is not None:
            examples = [example for example, _ in pairs]
        evaluator = self.pipeline.evaluator_on(examples, documents, measuring)
        evaluator.check()
        return evaluator.measure(self.model, progress)

    @property
    def generates(self) -> LlamaForCausalLM:
        """The model, where it can answer in words. Raises UserError where its head says other
        things."""
        if isinstance(self.model, LlamaWithHead):
            task = self.model.head_config.task
            raise UserError(
                f"{self.name} was trained with task: {task}, so it writes no text; measure it with "
                "`llamaweft evaluate`, or export it"
            )
        return self.model

    def usual_system(self) -> str | None:
        """The system message that all rows of a run have in common, if they do."""
        if open_run(self.name) is None:
            return None
        examples = self.pipeline.data.examples[:SYSTEM_ROWS]
        if not all(_has_system(example) for example in examples):
            return None
        said = {example.messages[0]["content"] for example in examples}
        return said.pop() if len(said) == 1 else None


def _has_system(example: Example) -> bool:
    return bool(example.messages) and example.messages[0]["role"] == "system"


def open_subject(name: str, settings: Recipe | None = None) -> Subject:
    """A run folder, an adapter folder, or a model (folder, hub id, .gguf, builtin).

    settings: how it computes and is measured, where it is no run. Raises UserError when it is
    none of these, or cannot be loaded.
    """
    run = open_run(name)
    if run is not None:
        return Subject(name, run, run.trained_model())
    if settings is not None and settings.task in HEAD_TASKS:
        raise UserError(
            f"{name} is no run, so it has no head for task: {settings.task}; give a run folder"
        )
    if (Path(name) / CONFIG).is_file():
        config, base, state = read_adapter(Path(name))
        if any(f".{head}." in key for key in state for head in HEAD_NAMES):
            raise UserError(
                f"{name} holds a head beside the adapter, and not what its outputs mean; give the "
                "run folder that it is in"
            )
        revision = None if Path(base).exists() else base_revision(Path(name))
        recipe = _with_model(settings, base, adapter_tokens(Path(name)), revision)
        pipeline = Pipeline(recipe)
        pipeline.check_whole(config, f"the adapter {name}")
        model = pipeline.load_frozen(trained=config.modules_to_save)
        inject(model, config)
        train_whole(model, [model.get_submodule(module) for module in config.modules_to_save])
        load_adapter_state(model, state, name)
        return Subject(name, pipeline, model.eval())
    pipeline = Pipeline(_with_model(settings, name))
    return Subject(name, pipeline, pipeline.load_frozen())


def _with_model(
    settings: Recipe | None,
    model: str,
    tokens: Sequence[tuple[str, bool]] | None = None,
    revision: str | None = None,
) -> Recipe:
    """The settings for another model. tokens: that it gets beside its own; None: those of the
    settings that it lacks. revision: of a model of the hub, where it is not that of the
    settings."""
    if settings is None:
        settings = Recipe.validate_tree({"model": model, "data": {"train": "not read"}})
    if revision is None and settings.model == model:
        revision = settings.model_revision
    new = settings.data.new_tokens
    if tokens is not None:
        new = [NewToken(token=text, special=special) for text, special in tokens]
    elif new:
        known = load_tokenizer(find_folder(model, revision)).get_vocab()
        new = [token for token in new if token.token not in known]
    data = settings.data.model_copy(update={"new_tokens": new})
    return settings.model_copy(update={"model": model, "model_revision": revision, "data": data})


def compare_subjects(
    subject: str,
    base: str | None,
    *,
    recipe: Path | None = None,
    data: str | None = None,
    metrics: Sequence[str] | None = None,
    say: Callable[[str], None] = lambda what: None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure `subject`, and `base` on the same rows where one is given.

    The rows are those of `data`, else the held-out ones of `recipe`, else of the run itself.
    The result is that of evaluation.json: "before" is the base, "after" the subject; without
    a base "after" is None. Raises UserError when there are no rows or a metric is unknown.
    """
    for metric in metrics or ():
        try:
            known_metric(metric)
        except ValueError as error:
            raise UserError(f"--metrics: {error}") from None
    run = open_run(subject)
    if recipe is not None:
        settings = Recipe.load(recipe)
    elif run is not None:
        settings = run.recipe
    elif data is not None:
        rows = {"train": data, "validation": {"path": data}}
        settings = Recipe.validate_tree({"model": subject, "data": rows}, "the options")
    else:
        raise UserError(f"{subject} is no run, so it has no held-out rows; give --recipe or --data")
    for metric in metrics or ():
        try:
            fitting_metric(metric, settings.task)
        except ValueError as error:
            raise UserError(f"--metrics: {error}") from None
    say(f"loading {subject}")
    opened = open_subject(subject, settings)
    examples = _rows(Pipeline(settings), data)
    wanted = settings.evaluation
    if metrics:
        wanted = wanted.model_copy(update={"metrics": list(metrics)})
    say(f"measuring {subject} on {len(examples)} rows")
    measured = opened.measure(examples, wanted, progress)
    if base is None:
        return side_by_side(measured, None)
    say(f"loading {base}")
    del opened
    other = open_subject(base, settings)
    say(f"measuring {base} on {len(examples)} rows")
    return side_by_side(other.measure(examples, wanted, progress), measured)


def _rows(pipeline: Pipeline, data: str | None) -> Sequence[Example]:
    if data is not None:
        return pipeline.preparation.read(PlainSource(data))
    if not pipeline.data.validation:
        raise UserError("the recipe holds no rows out (data.validation: null); give --data")
    return pipeline.data.validation


def export_run(
    run: Path,
    to: str,
    output: Path,
    *,
    verify: bool = True,
    merge_into: str = "auto",
    quantization: str | None = None,
    say: Callable[[str], None] = lambda what: None,
) -> Parity | None:
    """Write the trained model of a run for other programs: `to` is hf (one merged folder), peft,
    gguf, ollama, or head (a head alone).

    merge_into: original, dequantised, or auto: the original weights of the base model where they
    are at hand. quantization: of a GGUF; None: q8_0. say: told what is merged into what. With
    `verify` the export is opened by its consumer and compared (docs/export.md).
    Raises UserError for what is no run, for an output that is not empty and for what cannot be
    exported so, RunError when the export answers differently; nothing is left then.
    """
    pipeline = open_run(run)
    if pipeline is None:
        raise UserError(f"{run} is no run folder: it has no recipe.yaml")
    wanted = Wanted(to, merge_into, quantization, verify)
    with written_aside(output) as aside:
        parity = Export(pipeline, wanted, run.resolve().name, say).write(aside)
        if parity is not None:
            write_json(aside / "parity.json", parity.to_dict())
            if not parity.passed:
                raise RunError(
                    f"the export answers differently from {parity.compared_with} ({parity.why}); "
                    "nothing was written"
                )
    return parity
