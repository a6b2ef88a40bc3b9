"""`evaluate --tasks`: a run, its adapter and its base on tasks of lm-evaluation-harness.

The numbers are compared with the harness' own class for Hugging Face models in tests/parity/.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import pytest
from conftest import write_recipe
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from test_tasks import CLASSES, write_task

from llamaweft.evaluate import harness_tasks

TASKS = Path(__file__).parents[1] / "harness_tasks"
NAMES = ["tiny_choice", "tiny_rolling", "tiny_answers"]
COLOURS = ["red", "green", "blue"]


def task_row(i: int) -> dict:
    """The answer is said by the question, so that a small model can learn it."""
    colour = COLOURS[i % 3]
    text = f"The {colour} house number {i} is {colour}."
    question = f"Which colour is the {colour} house number {i}?"
    return {"question": question, "choices": COLOURS, "answer": i % 3, "text": text}


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which the tasks find their rows, and a harness that knows no other tasks."""
    for name, first in (("rows", 0), ("shots", 50)):
        lines = [json.dumps(task_row(first + i)) for i in range(12)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(harness_tasks, "TaskManager", partial(TaskManager, include_defaults=False))
    return tmp_path


def trained(tiny_folder: Path, folder: Path, command) -> None:
    """A run that learns the text of the questions with their answers."""
    texts = []
    for i in range(100, 130):
        row = task_row(i)
        texts.append(f"Question: {row['question']}\nAnswer: {COLOURS[row['answer']]}\n")
    (folder / "texts.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    tree = {
        "model": str(tiny_folder),
        "task": "text",
        "data": {"train": "texts.jsonl", "validation": {"fraction": 0.1}},
        "adapter": {"r": 8},
        "base_weights": "fp32",
        "training": {
            "learning_rate": 2e-2,
            "max_steps": 12,
            "micro_batch_tokens": 256,
            "gradient_accumulation_steps": 1,
            "compute_dtype": "fp32",
            "device": "cpu",
        },
        "output_dir": "run",
    }
    write_recipe(tree, folder / "recipe.yaml")
    command("train", "recipe.yaml")


def test_a_run_beside_its_base_and_as_an_export_of_it(
    tiny_folder: Path, rows: Path, command, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(tiny_folder, rows, command)
    options = ("--include-path", TASKS, "--num-fewshot", "1", "--limit", "10")
    call = ("evaluate", "run", "--tasks", ",".join(NAMES), *options)
    shown = command(*call, "--compare", tiny_folder, "--output", "out.json")
    content = json.loads((rows / "out.json").read_text())
    before, after = (content[side]["metrics"] for side in ("before", "after"))
    assert all(word in shown for word in ("tiny_choice", "tiny_rolling", "better"))
    assert before.keys() == after.keys() == content["difference"].keys()

    command("export", "run", "--to", "hf", "--output", "hf", "--no-verify")
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # it takes seconds
    expected = simple_evaluate(
        model=HFLM(pretrained=str(rows / "hf"), device="cpu", dtype="float32", batch_size=4),
        tasks=NAMES,
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
        num_fewshot=1,
        limit=10,
        bootstrap_iters=0,
        log_samples=False,
    )["results"]
    assert len(after) == 6
    for name, measured in after.items():
        task, metric = name.split(" ")
        assert measured["value"] == pytest.approx(expected[task][f"{metric},none"], rel=1e-5)
        assert measured["count"] == 10
    words = "tiny_rolling word_perplexity"
    difference = content["difference"][words]
    assert difference["verdict"] == "better"
    assert difference["value"] == pytest.approx(after[words]["value"] - before[words]["value"])

    harness = content["harness"]
    assert (harness["limit"], harness["num_fewshot"]) == (10, 1)
    assert harness["lm_eval_version"].startswith("0.4")
    assert harness["models"]["after"]["name"] == "run"
    assert harness["models"]["before"]["model"] == str(tiny_folder)
    assert harness["models"]["before"]["compute_dtype"] == "fp32"  # as the run computes
    assert content["tasks"]["tiny_rolling"]["version"] == 2.0
    assert content["tasks"]["tiny_choice"]["rows"] == 10
    assert content["tasks"]["tiny_choice"]["of_rows"] == 12
    first = content["examples"][0]
    assert (first["where"], first["reference"]) == ("tiny_choice row 1", "red")
    assert {first["before"], first["after"]} <= {*COLOURS}

    call = ("evaluate", "run/adapter", "--tasks", "tiny_rolling", *options[:2], "--limit", "10")
    alone = json.loads(command(*call, "--json"))
    assert alone["after"] is None
    measured = alone["before"]["metrics"]["tiny_rolling bits_per_byte"]["value"]
    value = after["tiny_rolling bits_per_byte"]["value"]
    assert measured == pytest.approx(value, rel=1e-2)  # it may compute in another dtype


REFUSED = [
    (["--tasks", "tiny_chioce", "--include-path", TASKS], ["'tiny_chioce'", "tiny_choice"]),
    (["--tasks", "tiny_choice", "--include-path", "gone"], ["--include-path", "gone"]),
    (
        ["--tasks", "tiny_rolling", "--include-path", "odd", "--num-fewshot", "2"],
        ["--num-fewshot 2", "tiny_rolling"],
    ),
    (["--tasks", "tiny_answers", "--include-path", "odd"], ["tiny_answers", "do_sample"]),
    (["--tasks", "beams", "--include-path", "odd"], ["beams", "num_beams: 4"]),
    (["--tasks", "far", "--include-path", "odd"], ["far", "cannot be loaded", "hub"]),
    (["--tasks", "long", "--include-path", "odd"], ["999999 tokens", "no room"]),
    (["--tasks", "tiny_choice", "--data", "rows.jsonl"], ["--data", "rows of your own"]),
    (["--limit", "3"], ["--limit", "--tasks"]),
    (["--apply-chat-template"], ["--apply-chat-template", "--tasks"]),
]


def write_odd_tasks(folder: Path) -> None:
    """Tasks that cannot be run here."""
    folder.mkdir()
    answers = (TASKS / "tiny_answers.yaml").read_text()
    rolling = (TASKS / "tiny_rolling.yaml").read_text()
    named = answers.replace("task: tiny_answers", "task: {}", 1)
    files = {
        "tiny_rolling": f"{rolling}num_fewshot: 0\n",
        "tiny_answers": answers.replace("do_sample: false", "do_sample: true, temperature: 1.0"),
        "beams": named.replace("task: {}", "task: beams").replace(
            "do_sample: false", "num_beams: 4"
        ),
        "far": named.replace("task: {}", "task: far").replace(
            "dataset_path: json", "dataset_path: no/rows"
        ),
        "long": named.replace("task: {}", "task: long").replace(
            "max_gen_toks: 8", "max_gen_toks: 999999"
        ),
    }
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)


def test_what_cannot_be_measured_is_refused(tiny_folder: Path, rows: Path, command) -> None:
    write_odd_tasks(rows / "odd")
    for options, words in REFUSED:
        said = command("evaluate", tiny_folder, *options, "--output", "out.json", code=2)
        for word in words:
            assert word in said
        assert not (rows / "out.json").exists()


def test_a_run_with_a_head_and_a_tokenizer_without_chats(
    tiny_folder: Path, rows: Path, command, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--tasks", "tiny_choice", "--include-path", TASKS)
    for name in ("rows", "shots"):
        (rows / f"{name}.jsonl").rename(rows / f"{name}.kept")
    write_task(rows, tiny_folder, CLASSES, max_steps=1)
    command("train", "recipe.yaml")
    said = command("evaluate", "run", *options, code=2)
    assert f"task: {CLASSES}, so it writes no text" in said
    for name in ("rows", "shots"):
        (rows / f"{name}.kept").rename(rows / f"{name}.jsonl")
    monkeypatch.setattr("llamaweft.pieces.given.load_tokenizer", without_chats)
    said = command("evaluate", tiny_folder, *options, "--apply-chat-template", code=2)
    assert "no chat template" in said


def without_chats(folder: Path):
    from llamaweft.model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = None
    return tokenizer


def test_a_harness_that_is_not_installed(
    tiny_folder: Path, command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    said = command("evaluate", tiny_folder, "--tasks", "arc_easy", code=2)
    assert "not installed" in said
    assert "llamaweft[harness]" in said


def test_a_task_of_the_harness_whose_rows_are_on_the_hub(tiny_folder: Path, command) -> None:
    said = command("evaluate", tiny_folder, "--tasks", "arc_easy", code=2)
    assert "arc_easy cannot be loaded" in said
    assert "hub" in said
