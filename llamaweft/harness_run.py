"""A run or a model on tasks of lm-evaluation-harness, alone or beside another one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llamaweft.data.chat import Document
from llamaweft.data.packing import WINDOW_DOCUMENTS, pack_window
from llamaweft.data.targets import HEAD_TASKS
from llamaweft.errors import UserError
from llamaweft.evaluate.evaluator import Progress
from llamaweft.model.llama import LlamaForCausalLM
from llamaweft.model.pack import Pack
from llamaweft.pipeline import open_run
from llamaweft.prefixes import prefix_tree
from llamaweft.subject import Subject, open_subject


def compare_on_tasks(
    subject: str,
    base: str | None,
    names: Sequence[str],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    include_path: Path | None = None,
    apply_chat_template: bool = False,
    say: Callable[[str], None] = lambda what: None,
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """Measure `subject`, and `base` where one is given, on tasks; the options are those of
    `TaskOptions`. The result has the form of evaluation.json, with "tasks" and "harness" saying
    what was measured. A base computes as the run does.

    Raises UserError where lm_eval is not installed, for tasks as `load_tasks` does, and for a
    model that writes no text.
    """
    if find_spec("lm_eval") is None:
        raise UserError(
            "--tasks needs lm-evaluation-harness, which is not installed; "
            "pip install 'llamaweft[harness]'"
        )
    say("loading lm-evaluation-harness")
    from llamaweft.evaluate.harness_tasks import TaskOptions, load_tasks, run_tasks, task_evaluation

    options = TaskOptions(names, limit, num_fewshot, include_path, apply_chat_template)
    run = open_run(subject)
    settings = None if run is None else run.recipe
    if run is not None and run.recipe.task in HEAD_TASKS:
        raise _no_text(subject, run.recipe.task)
    say(f"loading the tasks {', '.join(names)}")
    tasks = load_tasks(options)
    found, models = [], []
    for name in (subject, base):
        if name is None:
            continue
        say(f"loading {name}")
        opened = open_subject(name, settings)
        model = as_harness_model(opened, apply_chat_template, progress)
        say(f"measuring {name}")
        found.append(run_tasks(model, tasks, options))
        models.append(_provenance(opened))
        del opened, model
    if base is None:
        content, names_of = task_evaluation(found[0], None), ["before"]
    else:
        content, names_of = task_evaluation(found[1], found[0]), ["after", "before"]
    content["harness"] = {
        "lm_eval_version": version("lm_eval"),
        "limit": limit,
        "num_fewshot": num_fewshot,
        "include_path": None if include_path is None else str(include_path),
        "apply_chat_template": apply_chat_template,
        "models": dict(zip(names_of, models, strict=True)),
    }
    return content


def _no_text(subject: str, task: str) -> UserError:
    return UserError(
        f"--tasks: {subject} was trained with task: {task}, so it writes no text; measure it on "
        "held-out rows, without --tasks"
    )


def as_harness_model(opened: Subject, apply_chat_template: bool, progress: Progress) -> Any:
    """What lm-evaluation-harness asks. Raises UserError for a model that writes no text, and where
    chats are asked for and the tokenizer has no template."""
    from llamaweft.evaluate.harness import HarnessModel

    pipeline = opened.pipeline
    if apply_chat_template and not pipeline.tokenizer.chat_template:
        raise UserError(
            f"--apply-chat-template: the tokenizer of {opened.name} has no chat template; leave "
            "the option out"
        )
    capacity = pipeline.recipe.training.micro_batch_tokens
    return HarnessModel(
        opened.generates.eval(),
        pipeline.tokenizer,
        score=lambda model, documents, told: sequence_scores(model, documents, capacity, told),
        cache_bytes=pipeline.cache_bytes,
        progress=progress,
    )


@torch.inference_mode()
def sequence_scores(
    model: LlamaForCausalLM, documents: Sequence[Document], capacity: int, progress: Progress
) -> list[tuple[float, bool]]:
    """For each document the log-probability of its labels, and whether all are the likeliest.

    capacity: tokens computed at once. What documents begin with in common is computed once in a
    pack, and documents that begin alike are put there together: the choices of a question, and
    questions after the same examples.
    """
    found: list[tuple[float, bool]] = [(0.0, False)] * len(documents)
    done = 0
    for first in range(0, len(documents), WINDOW_DOCUMENTS):
        window = documents[first : first + WINDOW_DOCUMENTS]
        tree = prefix_tree([document.ids for document in window])
        order = list(range(len(window)))
        for packed in pack_window(tree, order, capacity, np.random.default_rng(0)):
            chosen = [window[place] for place in packed.documents]
            pack = Pack.from_documents(chosen, share=True).to(model.device)
            scores = model.sequence_scores(pack)
            for place, score in zip(packed.documents, scores, strict=True):
                found[first + place] = score
            done += len(chosen)
            progress(done, len(documents))
    return found


def _provenance(opened: Subject) -> dict[str, Any]:
    pipeline = opened.pipeline
    return {
        "name": opened.name,
        "model": pipeline.recipe.model,
        "base_weights": pipeline.base_weights,
        "compute_dtype": pipeline.runtime.compute_dtype_name,
        "device": str(pipeline.runtime.device),
    }
