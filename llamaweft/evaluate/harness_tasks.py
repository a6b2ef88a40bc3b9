"""Tasks of lm-evaluation-harness: loaded, run on a model, and put in evaluation.json's form.

Importing this needs lm_eval, and takes seconds.
"""

from __future__ import annotations

import contextlib
import difflib
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.api import metrics as theirs
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from llamaweft.errors import UserError
from llamaweft.evaluate.bootstrap import Score, compare, ratio, summarise
from llamaweft.evaluate.evaluator import EXAMPLES_SHOWN
from llamaweft.evaluate.harness import HarnessModel, greedy_options
from llamaweft.evaluate.metrics import perplexity

PYTHON_SEED, OTHER_SEED = 0, 1234
"""The harness' own, for tasks that draw their few-shot examples."""

Tasks = dict[str, Any]
"""What TaskManager.load returns: "tasks" by name, and "groups"."""


@dataclass(frozen=True)
class TaskOptions:
    """names: of tasks, groups or tags, or patterns of names. limit: rows of each task, the first
    ones. num_fewshot: answered examples before each; None: as the task says. include_path: a folder
    of further tasks. apply_chat_template: whether prompts are written as chats."""

    names: Sequence[str]
    limit: int | None = None
    num_fewshot: int | None = None
    include_path: Path | None = None
    apply_chat_template: bool = False


def load_tasks(options: TaskOptions) -> Tasks:
    """The tasks with their rows. Raises UserError for a name that is none, rows that cannot be
    read, and for what this bridge does not serve: pictures and sound, code that is run, answers
    that are not greedy."""
    folder = options.include_path
    if folder is not None and not folder.is_dir():
        raise UserError(f"--include-path: there is no folder {folder}")
    random.seed(PYTHON_SEED)
    np.random.seed(OTHER_SEED)
    with contextlib.redirect_stdout(sys.stderr):  # a task may print
        manager = TaskManager(include_path=None if folder is None else str(folder))
        tasks = _loaded(manager, [n for name in options.names for n in _known(manager, name)])
    for name, task in tasks["tasks"].items():
        _check(name, task)
        _set_fewshot(name, task, options.num_fewshot)
    return tasks


def _known(manager: TaskManager, name: str) -> list[str]:
    found: list[str] = manager.match_tasks([name])
    if not found:
        nearest = difflib.get_close_matches(name, manager.all_tasks, n=3)
        advice = f"; the nearest are {', '.join(nearest)}" if nearest else ""
        raise UserError(
            f"--tasks: {name!r} is no task of lm-evaluation-harness{advice}; a task of your own is "
            "found with --include-path"
        )
    return found


def _loaded(manager: TaskManager, names: list[str]) -> Tasks:
    try:
        return dict(manager.load(list(dict.fromkeys(names))))
    except Exception as error:  # a task is anybody's code, and its rows come from anywhere
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise UserError(
            f"--tasks: {', '.join(names)} cannot be loaded: {reason}; the rows of a task come from "
            "the Hugging Face hub, unless its file in --include-path names local ones"
        ) from error


def _check(name: str, task: Any) -> None:
    if getattr(task, "MULTIMODAL", False):
        raise UserError(f"--tasks: {name} shows pictures or sound, and the model reads text only")
    if getattr(task, "UNSAFE_CODE", False):
        raise UserError(f"--tasks: {name} runs code that a model writes, which is not done here")
    if task.OUTPUT_TYPE == "generate_until":
        greedy_options(task.get_config("generation_kwargs") or {}, name)


def _set_fewshot(name: str, task: Any, wanted: int | None) -> None:
    own = task.get_config("num_fewshot")
    if wanted is not None and own == 0 and wanted != 0:
        raise UserError(
            f"--num-fewshot {wanted}: the task {name} says that it takes no examples; leave the "
            "option or the task out"
        )
    task.set_config(key="num_fewshot", value=(own or 0) if wanted is None else wanted)
    task.set_fewshot_seed(seed=OTHER_SEED)


def run_tasks(model: HarnessModel, tasks: Tasks, options: TaskOptions) -> dict[str, Any]:
    """{"metrics": "TASK METRIC" -> {"value", and where rows add up "low", "high", "count"},
    "parts": what each row adds, "scores": how a value comes from the sum, "lower": whether less is
    better, "answers": of some rows, "tasks": version, examples and rows of each}."""
    with contextlib.redirect_stdout(sys.stderr):
        results = evaluate(
            lm=model,
            task_dict=tasks,
            limit=options.limit,
            bootstrap_iters=0,
            log_samples=True,
            apply_chat_template=options.apply_chat_template,
            fewshot_as_multiturn=True,
        )
    assert results is not None
    found: dict[str, Any] = {"metrics": {}, "parts": {}, "scores": {}, "lower": {}}
    for name, values in results["results"].items():
        task = tasks["tasks"].get(name)
        for key, value in values.items():
            metric, comma, chosen = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            shown = f"{name} {metric}" if chosen == "none" else f"{name}/{chosen} {metric}"
            better = results["higher_is_better"].get(name, {}).get(metric)
            found["metrics"][shown] = {"value": float(value)}
            found["lower"][shown] = None if better is None else not better
            if task is not None:
                rows = [one for one in results["samples"][name] if one["filter"] == chosen]
                _add_rows(found, shown, metric, task, rows)
    found["answers"] = [
        answer
        for name, samples in results["samples"].items()
        for answer in _answers(name, tasks["tasks"][name], samples)
    ]
    found["tasks"] = {
        name: {
            "version": results["versions"][name],
            "num_fewshot": results["n-shot"][name],
            "rows": count["effective"],
            "of_rows": count["original"],
        }
        for name, count in results["n-samples"].items()
    }
    return found


def _minus_first(row: Any) -> list[float]:
    total, weight = row
    return [-float(total), float(weight)]


def _bits(sums_DS: np.ndarray) -> np.ndarray:
    return ratio(sums_DS) / np.log(2)


ADDING_UP: dict[Callable[..., Any], tuple[Callable[[Any], list[float]], Score]] = {
    theirs.mean: (lambda value: [float(value), 1.0], ratio),
    theirs.perplexity: (lambda value: [-float(value), 1.0], perplexity),
    theirs.weighted_perplexity: (_minus_first, perplexity),
    theirs.bits_per_byte: (_minus_first, _bits),
}
"""Ways in which the harness puts rows together: what a row adds, and the value of a sum."""


def _add_rows(
    found: dict[str, Any], shown: str, metric: str, task: Any, rows: list[dict[str, Any]]
) -> None:
    """The interval of a metric that is computed from a sum over rows."""
    way = ADDING_UP.get(task.aggregation().get(metric))
    values = [row[metric] for row in rows if metric in row]
    if way is None or not values:
        return
    of_row, score = way
    parts = [of_row(value) for value in values]
    if not np.isfinite(parts).all():
        return
    found["parts"][shown], found["scores"][shown] = parts, score
    found["metrics"][shown] = asdict(summarise(parts, score)) | found["metrics"][shown]


def _answers(name: str, task: Any, samples: list[dict[str, Any]]) -> list[dict[str, str]]:
    """What was said of the rows of a task, where something is: an answer, or the likeliest of
    several."""
    first = samples[0]["filter"] if samples else None
    found = []
    for row in (row for row in samples if row["filter"] == first):
        arguments, target = row["arguments"], row["target"]
        if task.OUTPUT_TYPE == "multiple_choice":
            alone = not arguments[0][
                0
            ]  # else choices without a context are there for acc_mutual_info
            offered = [i for i, (context, *_) in enumerate(arguments) if context or alone]
            choices = [arguments[i][1].strip() for i in offered]
            said = choices[int(np.argmax([row["resps"][i][0][0] for i in offered]))]
            inside = isinstance(target, int) and 0 <= target < len(choices)
            reference = choices[target] if inside else str(target)
        elif task.OUTPUT_TYPE == "generate_until":
            said, reference = str(row["filtered_resps"][0]), str(target)
        else:
            return []
        where = f"{name} row {row['doc_id'] + 1}"
        prompt = str(arguments[0][0])
        found.append({"where": where, "prompt": prompt, "reference": reference, "answer": said})
    return found


def task_evaluation(before: dict[str, Any], after: dict[str, Any] | None) -> dict[str, Any]:
    """The content of evaluation.json from what `run_tasks` found on the same tasks: both sides, and
    the paired test of what is a sum over rows."""
    others = before["answers"] if after is None else after["answers"]
    pairs = list(zip(before["answers"], others, strict=True))
    content: dict[str, Any] = {
        "name": "tasks of lm-evaluation-harness",
        "before": {"metrics": before["metrics"]},
        "after": None if after is None else {"metrics": after["metrics"]},
        "examples": [
            {key: old[key] for key in ("where", "prompt", "reference")}
            | {"before": old["answer"]}
            | ({} if after is None else {"after": new["answer"]})
            for old, new in pairs[:: max(1, len(pairs) // EXAMPLES_SHOWN)][:EXAMPLES_SHOWN]
        ],
        "tasks": before["tasks"],
    }
    if after is not None:
        content["difference"] = {
            name: asdict(
                compare(old, after["parts"][name], before["scores"][name], lower_is_better=lower)
            )
            for name, old in before["parts"].items()
            if name in after["parts"]
            and len(old) == len(after["parts"][name])
            and (lower := before["lower"][name]) is not None
        }
    return content
