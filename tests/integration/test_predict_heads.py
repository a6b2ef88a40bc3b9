"""`predict` on runs with a head: rows without labels in, what the head says out, as transformers'
own classes say it of the exported folder.

Tolerance: logits of two fp32 implementations of two layers, 1e-5.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_tasks import ANSWERS, CLASSES, NUMBER, TAGS, row_of, write_task
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForTokenClassification,
    AutoTokenizer,
    pipeline,
)

from llamaweft import predictions

ROWS = 21
LABELS = {CLASSES: "label", NUMBER: "label", TAGS: "tags", ANSWERS: "answers"}


def ask(folder: Path, task: str, labels: bool = False) -> list[dict]:
    """Write rows.jsonl's like, with labels that nobody should read, or without any."""
    rows = [row_of(task, 100 + i) for i in range(ROWS)]
    for row in rows:
        del row[LABELS[task]]
        if labels:
            row[LABELS[task]] = {"no": "such label"}
    (folder / "ask.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return rows


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def expected_of(task: str, folder: Path, rows: list[dict]) -> list[dict]:
    """What transformers says of each row, from the exported folder."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if task in (CLASSES, NUMBER):
        kind = {"function_to_apply": "none"} if task == NUMBER else {"function_to_apply": "softmax"}
        said = pipeline("text-classification", str(folder), tokenizer=tokenizer, device="cpu")
        found = [said(row["text"], top_k=None, **kind) for row in rows]
        if task == NUMBER:
            return [{"value": one["score"]} for (one,) in found]
        return [
            {
                "label": max(each, key=lambda one: one["score"])["label"],
                "scores": {one["label"]: one["score"] for one in each},
            }
            for each in found
        ]
    if task == TAGS:
        model = AutoModelForTokenClassification.from_pretrained(folder)
        return [{"tags": _tags(model, tokenizer, row["tokens"])} for row in rows]
    model = AutoModelForQuestionAnswering.from_pretrained(folder)
    return [_answer(model, tokenizer, row) for row in rows]


def _tags(model, tokenizer, words: list[str]) -> list[str]:
    text = " ".join(words)
    given = tokenizer(text, return_tensors="pt", return_offsets_mapping=True)
    ends = given.pop("offset_mapping")[0, :, 1].tolist()
    with torch.inference_mode():
        said = model(**given).logits[0].argmax(-1).tolist()
    found, at = [], -1
    for word in words:
        at += 1 + len(word)
        found.append(model.config.id2label[said[ends.index(at)]])
    return found


def _answer(model, tokenizer, row: dict) -> dict:
    given = tokenizer(
        row["question"], row["context"], return_tensors="pt", return_offsets_mapping=True
    )
    sides, offsets = given.sequence_ids(0), given.pop("offset_mapping")[0].tolist()
    with torch.inference_mode():
        found = model(**given)
    begins, ends = found.start_logits[0].softmax(-1), found.end_logits[0].softmax(-1)
    best = (float(begins[0] * ends[0]), None, None)
    for i in range(len(sides)):
        for j in range(i, len(sides)):
            if sides[i] == sides[j] == 1 and float(begins[i] * ends[j]) > best[0]:
                best = (float(begins[i] * ends[j]), i, j)
    score, i, j = best
    if i is None:
        return {"answer": "", "start": None, "score": score}
    text = row["context"][offsets[i][0] : offsets[j][1]]
    start = offsets[i][0] + len(text) - len(text.lstrip())
    return {"answer": text.strip(), "start": start, "score": score}


@pytest.mark.parametrize("task", [CLASSES, NUMBER, TAGS, ANSWERS])
def test_a_head_says_what_the_exported_model_says(
    tiny_folder: Path, tmp_path: Path, command, task: str
) -> None:
    write_task(tmp_path, tiny_folder, task)
    command("train", "recipe.yaml")
    command("export", "run", "--to", "hf", "--output", "hf", "--no-verify")
    rows = ask(tmp_path, task)
    made = json.loads(command("predict", "run", "ask.jsonl", "--output", "said.jsonl", "--json"))
    assert (made["answers"], made["made_now"]) == (ROWS, ROWS)
    said = lines_of(tmp_path / "said.jsonl")
    expected = expected_of(task, tmp_path / "hf", rows)
    for number, (row, ours, theirs) in enumerate(zip(rows, said, expected, strict=True), 1):
        asked = {"row": number} | row
        assert {key: ours[key] for key in asked} == asked
        assert ours.keys() == asked.keys() | theirs.keys()
        for name, value in theirs.items():
            if isinstance(value, float | dict):
                assert ours[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name
            else:
                assert ours[name] == value, name
    if task != NUMBER:  # else the head said one thing of all and the test would be weak
        assert (
            len(
                {
                    json.dumps([one[name] for name in expected[0] if name != "scores"])
                    for one in said
                }
            )
            > 1
        )

    ask(tmp_path, task, labels=True)  # whatever a row says that the head should say is left out
    command("predict", "run", "ask.jsonl", "--output", "again.jsonl")
    assert lines_of(tmp_path / "again.jsonl") == said
    assert "--max-new-tokens" in command(
        "predict", "run", "ask.jsonl", "--output", "x", "--max-new-tokens", "4", code=2
    )


def test_several_classes_numbers_as_labels_and_pairs(
    tiny_folder: Path, tmp_path: Path, command
) -> None:
    recipe = json.loads(write_task(tmp_path, tiny_folder, CLASSES).read_text())
    recipe["evaluation"]["metrics"] = ["loss"]
    rows = [
        {"text": f"Day {i} was {'fine' if i % 2 else 'grim'}", "text_pair": f"{i % 3}"}
        | {"labels": [10] * (i % 2) + [9] * (i % 3 == 0)}
        for i in range(40)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    command("train", "recipe.yaml")
    command("predict", "run", "rows.jsonl", "--output", "said.jsonl")
    command("export", "run", "--to", "hf", "--output", "hf", "--no-verify")
    theirs = pipeline("text-classification", str(tmp_path / "hf"), device="cpu")
    for row, said in zip(rows, lines_of(tmp_path / "said.jsonl"), strict=True):
        expected = theirs({key: row[key] for key in ("text", "text_pair")}, top_k=None)
        scores = {one["label"]: one["score"] for one in expected}
        assert said["scores"] == pytest.approx(scores, rel=1e-5, abs=1e-5)
        assert list(said) == ["row", "text", "text_pair", "labels", "scores"]
        assert said["text_pair"] == row["text_pair"]
        assert list(said["scores"]) == ["9", "10"]
        assert said["labels"] == [n for n in (9, 10) if said["scores"][str(n)] >= 0.5]
    assert any(len(said["labels"]) == 1 for said in lines_of(tmp_path / "said.jsonl"))


@pytest.fixture
def classifier(tiny_folder: Path, tmp_path: Path, command) -> Path:
    """The folder of a run of one step, which reads at most 24 tokens."""
    path = write_task(tmp_path, tiny_folder, CLASSES, max_steps=1)
    tree = json.loads(path.read_text())
    tree["data"]["max_length_tokens"] = 24
    path.write_text(json.dumps(tree))
    command("train", "recipe.yaml")
    return tmp_path


def test_a_call_that_was_stopped_goes_on_in_order(
    classifier: Path, command, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(classifier, CLASSES)
    call = ("predict", "run", "ask.jsonl", "--output")
    command(*call, "whole.jsonl")
    monkeypatch.setattr(predictions, "GROUP_ROWS", 8)
    read, groups = predictions.head_answer, []

    def stopped(*given):
        groups.append(given)
        if len(groups) == 12:  # in the second group
            raise KeyboardInterrupt
        return read(*given)

    monkeypatch.setattr(predictions, "head_answer", stopped)
    with pytest.raises(AssertionError):
        command(*call, "said.jsonl")
    assert len((classifier / "said.jsonl.unfinished").read_text().splitlines()) == 1 + 8
    assert "go on with --resume" in command(*call, "said.jsonl", code=2)
    again = json.loads(command(*call, "said.jsonl", "--resume", "--json"))
    assert again["made_now"] == ROWS - 8
    ours, whole = (lines_of(classifier / name) for name in ("said.jsonl", "whole.jsonl"))
    assert [one["row"] for one in ours] == list(range(1, ROWS + 1))
    assert [one["label"] for one in ours] == [one["label"] for one in whole]
    for one, other in zip(ours, whole, strict=True):
        assert one["scores"] == pytest.approx(other["scores"], rel=1e-5)
    rows = [row_of(CLASSES, i) for i in range(5)]
    (classifier / "said.jsonl").unlink()
    (classifier / "said.jsonl.unfinished").write_text("{}\n")
    (classifier / "ask.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert "answers other prompts" in command(*call, "said.jsonl", "--resume", code=2)


UNREADABLE = [
    ({"prompt": "Hello"}, ["line 2", "text or sentence", CLASSES, "prompt"]),
    ({"text": 7}, ["line 2", "'text' must be text"]),
    ({"text": ""}, ["line 2", "no token"]),
    ({"text": "very " * 40}, ["line 2", "41 tokens", "data.max_length_tokens: 24"]),
]


def test_rows_that_cannot_be_read_are_refused_before_the_first_answer(
    classifier: Path, command
) -> None:
    good = json.dumps(row_of(CLASSES, 0))
    for row, words in UNREADABLE:
        (classifier / "ask.jsonl").write_text(f"{good}\n{json.dumps(row)}\n")
        said = command("predict", "run", "ask.jsonl", "--output", "said.jsonl", code=2)
        for word in words:
            assert word in said
        assert not list(classifier.glob("said*"))


def test_a_long_text_is_cut_where_training_cut_it(classifier: Path, command) -> None:
    command("train", "recipe.yaml", "data.on_too_long=truncate", "output_dir=cut")
    texts = [" very" * 24, " very" * 24 + " cold river" * 4]
    (classifier / "ask.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    command("predict", "cut", "ask.jsonl", "--output", "said.jsonl")
    whole, cut = (one["scores"] for one in lines_of(classifier / "said.jsonl"))
    assert cut == pytest.approx(whole, rel=1e-5)


def test_rewards_are_not_given(tmp_path: Path, command) -> None:
    recipe = {"model": "tiny", "task": "reward", "data": {"train": "pairs.jsonl"}}
    (tmp_path / "run").mkdir()
    (tmp_path / "run/recipe.yaml").write_text(json.dumps(recipe))
    (tmp_path / "ask.jsonl").write_text('{"prompt": "Hello"}\n')
    said = command("predict", "run", "ask.jsonl", "--output", "said.jsonl", code=2)
    assert "task: reward" in said
    assert "predict does not give rewards" in said
