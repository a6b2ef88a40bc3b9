"""Tasks with a head, from the command line: learnt, measured, exported, and refused where a head
says no words."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CITIES, write_recipe
from safetensors.torch import load_file
from test_cli import wait_for

CLASSES, NUMBER, TAGS, ANSWERS = (
    "sequence_classification",
    "regression",
    "token_classification",
    "question_answering",
)
MOODS = {
    "good": ["fine", "bright", "warm"],
    "bad": ["grim", "bleak", "cold"],
    'so "so"': ["plain", "usual", "mild"],
}


def row_of(task: str, i: int) -> dict:
    """Said by single words, so that a small model learns it."""
    city = CITIES[i % len(CITIES)]
    mood = list(MOODS)[i % 3]
    word = MOODS[mood][i // 3 % 3]
    match task:
        case "sequence_classification":
            return {"text": f"Day {i} in {city} was {word}", "label": mood}
        case "regression":
            return {"text": f"Day {i} in {city} was {word}", "label": float(i % 3) - 1}
        case "token_classification":
            return {
                "tokens": ["Day", str(i), "in", city, "was", word],
                "tags": ["O", "O", "O", "PLACE", "O", mood],
            }
    context = f"In {city} day {i} was {word}."
    answers = {"text": [city], "answer_start": [3]}
    if i % 5 == 4:
        context, answers = f"Day {i} was {word}.", {"text": [], "answer_start": []}
    return {"question": "Where?", "context": context, "answers": answers}


METRICS = {
    CLASSES: ["loss", "accuracy", "macro_f1", "micro_f1"],
    NUMBER: ["loss", "mae", "pearson"],
    TAGS: ["loss", "accuracy", "macro_f1", "micro_f1"],
    ANSWERS: ["loss", "exact_match", "f1"],
}
LABELS = {
    CLASSES: {"0": "bad", "1": "good", "2": 'so "so"'},
    NUMBER: {"0": "LABEL_0"},
    TAGS: {"0": "O", "1": "PLACE", "2": "bad", "3": "good", "4": 'so "so"'},
    ANSWERS: None,
}


def write_task(folder: Path, tiny_folder: Path, task: str, **training) -> Path:
    lines = [json.dumps(row_of(task, i)) for i in range(60)]
    (folder / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    settings = {"learning_rate": 1e-2, "max_steps": 12, "micro_batch_tokens": 256}
    settings |= {"gradient_accumulation_steps": 2, "checkpoint_every_steps": 6}
    tree = {
        "model": str(tiny_folder),
        "task": task,
        "data": {"train": "rows.jsonl", "validation": {"fraction": 0.3}},
        "adapter": {"r": 4},
        "base_weights": "fp32",
        "training": settings | {"compute_dtype": "fp32", "device": "cpu"} | training,
        "evaluation": {"every_steps": 6, "metrics": METRICS[task]},
        "output_dir": "run",
    }
    return write_recipe(tree, folder / "recipe.yaml")


@pytest.mark.parametrize("task", METRICS)
def test_a_task_from_rows_to_export(tiny_folder: Path, tmp_path: Path, command, task: str) -> None:
    write_task(tmp_path, tiny_folder, task)
    (shown,) = json.loads(command("data", "show", "recipe.yaml", "--rows", "1", "--json"))
    row = row_of(task, int(shown["where"].rpartition(" ")[2]) - 1)
    said = {TAGS: row.get("tags"), ANSWERS: ["begins", "ends"]}.get(task, [row.get("label")])
    assert shown["labels"] == [f"{name:g}" if task == NUMBER else name for name in said]
    command("train", "recipe.yaml")
    evaluation = json.loads((tmp_path / "run/evaluation.json").read_text())
    before, after = (evaluation[side]["metrics"] for side in ("before", "after"))
    assert set(before) == set(after) == set(evaluation["difference"]) == set(METRICS[task])
    for name in METRICS[task][:2]:
        assert evaluation["difference"][name]["verdict"] == "better", evaluation
    assert after["loss"]["count"] == 18
    assert ("confusion" in evaluation) == (task in (CLASSES, TAGS))
    if task in (CLASSES, TAGS):
        confusion = evaluation["confusion"]["after"]
        assert confusion["labels"] == list(LABELS[task].values())
        counts = torch.tensor(confusion["counts"])
        assert counts.trace() / counts.sum() == pytest.approx(after["accuracy"]["value"])

    again = json.loads(command("evaluate", "run", "--json"))["before"]["metrics"]
    for name, value in after.items():
        assert again[name] == pytest.approx(value, rel=1e-5), name

    to_hf = json.loads(command("export", "run", "--to", "hf", "--output", "hf", "--json"))
    assert to_hf["parity"]["passed"]
    assert json.loads((tmp_path / "hf/config.json").read_text()).get("id2label") == LABELS[task]
    to_peft = ("export", "run", "--to", "peft", "--output", "peft", "--json")
    if task == ANSWERS:
        assert "question answering" in command(*to_peft, code=2)
        assert not (tmp_path / "peft").exists()
    else:
        assert json.loads(command(*to_peft))["parity"]["passed"]

    said = command("chat", "run", "--message", "Hello", code=2)
    assert f"run was trained with task: {task}, so it writes no text" in said
    metric = "mae" if task != NUMBER else "accuracy"
    said = command("evaluate", "run", "--metrics", metric, code=2)
    assert f"--metrics: {metric} does not fit task: {task}" in said


def test_a_killed_run_of_a_head_goes_on_bit_for_bit(
    tiny_folder: Path, tmp_path: Path, command
) -> None:
    recipe = write_task(tmp_path, tiny_folder, CLASSES, max_steps=30, checkpoint_every_steps=3)
    process = subprocess.Popen(
        [sys.executable, "-m", "llamaweft", "train", recipe.name],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for(tmp_path / "run/checkpoints/step-000009", process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    command("train", recipe.name, "--resume")
    command("train", recipe.name, "output_dir=whole")
    folders = [tmp_path / run for run in ("run", "whole")]
    for name in ("adapter/adapter_model", "checkpoints/step-000030/trained"):
        ours, theirs = (load_file(folder / f"{name}.safetensors") for folder in folders)
        assert any("score" in key or "head" in key for key in theirs)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    sides = [json.loads((folder / "evaluation.json").read_text()) for folder in folders]
    assert sides[0] == sides[1]


# --- what is refused before the start ------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "keys", "words"),
    [
        (CLASSES, {"evaluation": {"metrics": ["mae"]}}, ["evaluation.metrics: mae", CLASSES]),
        (
            NUMBER,
            {"evaluation": {"metrics": ["accuracy"]}},
            ["evaluation.metrics: accuracy", NUMBER],
        ),
        (
            "chat",
            {"evaluation": {"metrics": ["macro_f1"]}},
            ["evaluation.metrics: macro_f1", "chat"],
        ),
        ("chat", {"head": {"class_weights": "balanced"}}, ["head.class_weights", "task: chat"]),
        (NUMBER, {"head": {"class_weights": {"a": 2}}}, ["head.class_weights", NUMBER]),
        (
            CLASSES,
            {"head": {"class_weights": {"fair": 2}}},
            ["head.class_weights", "'fair'", "good"],
        ),
        (CLASSES, {"data": {"on_too_long": "split"}}, ["data.on_too_long: split", CLASSES]),
        (CLASSES, {"data": {"train_on": "all"}}, ["data.train_on", CLASSES]),
        (CLASSES, {"data": {"validation": {"path": "empty.jsonl"}}}, ["empty.jsonl", "no rows"]),
        (
            CLASSES,
            {"data": {"validation": {"path": "unseen.jsonl"}}},
            ["unseen.jsonl line 2", "'odd'"],
        ),
        (CLASSES, {"data": {"train": "rare.jsonl"}}, ["rare_class", "rare.jsonl line 61"]),
        (NUMBER, {"data": {"train": "rare.jsonl"}}, ["rare.jsonl line 61", "one number"]),
        (TAGS, {}, ["rows.jsonl line 1", "tagging"]),
    ],
)
def test_what_does_not_fit_is_refused(
    tiny_folder: Path, tmp_path: Path, command, task: str, keys: dict, words: list[str]
) -> None:
    of = CLASSES if task == TAGS else task if task in METRICS else CLASSES
    write_task(tmp_path, tiny_folder, of)
    good = row_of(of, 0)
    odd = good | {"text": "An odd day", "label": "odd"}
    rows = (tmp_path / "rows.jsonl").read_text()
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "unseen.jsonl").write_text(f"{json.dumps(good)}\n{json.dumps(odd)}\n")
    (tmp_path / "rare.jsonl").write_text(f"{rows}\n{json.dumps(odd)}\n")
    tree = json.loads((tmp_path / "recipe.yaml").read_text()) | {"task": task}
    tree["evaluation"]["metrics"] = ["loss"]
    if "train" in keys.get("data", {}):
        tree["data"]["validation"] = {"path": "rows.jsonl"}
        tree["audit"] = {"allow": ["validation_leak"]}
    for section, content in keys.items():
        tree[section] = tree.get(section, {}) | content
    refused(tree, tmp_path, command, *words)


def refused(tree: dict, folder: Path, command, *words: str) -> None:
    said = command("train", write_recipe(tree, folder / "recipe.yaml"), code=2)
    for word in words:
        assert word in said
    assert not (folder / "run").exists()


def test_an_adapter_folder_of_a_head_and_a_model_without_one(
    tiny_folder: Path, tmp_path: Path, command
) -> None:
    write_task(tmp_path, tiny_folder, CLASSES, max_steps=1)
    command("train", "recipe.yaml")
    assert "head" in command("chat", "run/adapter", "--message", "Hello", code=2)
    assert "head" in command("evaluate", tiny_folder, "--recipe", "recipe.yaml", code=2)
    assert "head" in command("evaluate", "run", "--compare", tiny_folder, code=2)
    shown = json.loads(command("data", "show", "recipe.yaml", "--rows", "1", "--json"))
    assert shown
    command("plan", "recipe.yaml")
