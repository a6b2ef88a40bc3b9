"""Rows and splits that a task with a head cannot learn from: each is named before the first step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_tasks import ANSWERS, CLASSES, METRICS, NUMBER, TAGS, refused, row_of, write_task

LONG = "very " * 60
PLACE = row_of(ANSWERS, 0)["context"]


def changed(task: str, **content) -> dict:
    return row_of(task, 0) | content


def answer(text: str, start: int) -> dict:
    return {"text": [text], "answer_start": [start]}


ROWS = [
    (TAGS, changed(TAGS, tags=["O", "O"]), ["6 tokens and 2 tags"]),
    (TAGS, changed(TAGS, tokens=["Day"]), ["1 tokens and 6 tags"]),
    (TAGS, changed(TAGS, tags=[]), ["6 tokens and 0 tags"]),
    (ANSWERS, changed(ANSWERS, answers=answer("Paris", 4)), ["'Paris'", "character 4"]),
    (ANSWERS, changed(ANSWERS, answers=answer(".", -1)), ["'.'", "character -1"]),
    (ANSWERS, changed(ANSWERS, answers=answer("Paris", 900)), ["'Paris'", "character 900"]),
    (ANSWERS, changed(ANSWERS, answers=answer("paris", 3)), ["'paris'", "character 3"]),
    (ANSWERS, changed(ANSWERS, answers=answer(PLACE + "!", 0)), ["character 0"]),
    (
        ANSWERS,
        changed(ANSWERS, answers={"text": ["Paris"], "answer_start": []}),
        ["two lists of the same length"],
    ),
]


@pytest.mark.parametrize("side", ["train", "validation"])
@pytest.mark.parametrize(("task", "row", "words"), ROWS, ids=range(len(ROWS)))
def test_a_row_whose_parts_do_not_fit(
    tiny_folder: Path, tmp_path: Path, command, task: str, row: dict, words: list[str], side: str
) -> None:
    tree = json.loads(write_task(tmp_path, tiny_folder, task).read_text())
    good = (tmp_path / "rows.jsonl").read_text()
    (tmp_path / "odd.jsonl").write_text(f"{good}\n{json.dumps(row)}\n")
    tree["data"] = {"train": "rows.jsonl", side: "odd.jsonl"}
    if side == "validation":
        tree["data"]["validation"] = {"path": "odd.jsonl"}
    refused(tree, tmp_path, command, "odd.jsonl line 61", *words)


def test_a_tag_of_validation_that_no_training_row_has(
    tiny_folder: Path, tmp_path: Path, command
) -> None:
    tree = json.loads(write_task(tmp_path, tiny_folder, TAGS).read_text())
    tags = ["O", "ODD", "O", "PLACE", "O", "O"]
    row = changed(TAGS, tokens=["No", "such", "day", "in", "a", "year"], tags=tags)
    (tmp_path / "odd.jsonl").write_text(json.dumps(row))
    tree["data"]["validation"] = {"path": "odd.jsonl"}
    refused(tree, tmp_path, command, "odd.jsonl line 1", "'ODD'", "no training row")


@pytest.mark.parametrize("task", METRICS)
def test_nothing_to_train_on_or_to_measure_on(
    tiny_folder: Path, tmp_path: Path, command, task: str
) -> None:
    tree = json.loads(write_task(tmp_path, tiny_folder, task).read_text())
    row = json.dumps(row_of(task, 0))
    (tmp_path / "one.jsonl").write_text(row)
    (tmp_path / "alike.jsonl").write_text(f"{row}\n{row}\n{row}\n")
    (tmp_path / "empty.jsonl").write_text("\n")
    few = "at least 2 are needed"
    for data, words in [
        ({"train": "one.jsonl", "validation": {"fraction": 0.5}}, ["data.validation", few]),
        ({"train": "alike.jsonl", "validation": {"fraction": 0.5}}, ["data.validation", few]),
        ({"train": "rows.jsonl", "validation": {"fraction": 0}}, ["data.validation.fraction"]),
        ({"train": "rows.jsonl", "validation": {"fraction": 1}}, ["data.validation.fraction"]),
        ({"train": "rows.jsonl", "validation": {"fraction": 1.5}}, ["data.validation.fraction"]),
        (
            {"train": "rows.jsonl", "validation": {"path": "empty.jsonl"}},
            ["empty.jsonl", "no rows"],
        ),
        ({"train": "empty.jsonl"}, ["empty.jsonl", "no rows"]),
    ]:
        refused(tree | {"data": data}, tmp_path, command, *words)


def long_row(task: str) -> dict:
    row = row_of(task, 0)
    if task == TAGS:
        words = LONG.split()
        return {"tokens": words, "tags": ["O"] * len(words)}
    name = "context" if task == ANSWERS else "text"
    return row | {name: row[name] + LONG}


@pytest.mark.parametrize("task", [CLASSES, NUMBER, TAGS, ANSWERS])
def test_rows_that_are_all_dropped_for_their_length(
    tiny_folder: Path, tmp_path: Path, command, task: str
) -> None:
    tree = json.loads(write_task(tmp_path, tiny_folder, task).read_text())
    (tmp_path / "long.jsonl").write_text(json.dumps(long_row(task)))
    limits = {"max_length_tokens": 40, "on_too_long": "drop"}
    tree["data"] = {"train": "rows.jsonl", "validation": {"path": "long.jsonl"}} | limits
    refused(tree, tmp_path, command, "no held-out row is left", "data.max_length_tokens")
    tree["data"] = {"train": "long.jsonl", "validation": None} | limits
    tree["audit"] = {"allow": ["rare_class"]}
    del tree["evaluation"]
    refused(tree, tmp_path, command, "no row is left to train on", "data.on_too_long")
