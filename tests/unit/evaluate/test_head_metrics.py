"""Metrics of heads against scikit-learn's and numpy's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from sklearn import metrics
from sklearn.preprocessing import MultiLabelBinarizer

from llamaweft.data.chat import Document
from llamaweft.data.classes import Classes
from llamaweft.data.example import Example, Labels, Preference, Span
from llamaweft.data.targets import LABEL, LAST, NO_CLASS
from llamaweft.evaluate.bootstrap import compare, ratio
from llamaweft.evaluate.head_evaluator import HeadEvaluator
from llamaweft.evaluate.head_metrics import HEAD_SCORES
from llamaweft.settings import TASK_METRICS

random = np.random.default_rng(5)
NAMES = ("A", "B", "O", "rare")
Rows = Sequence[Sequence[float]]


class Model:
    def eval(self) -> None:
        pass


def measured(task: str, expected: Rows, logits: Sequence[np.ndarray], many: bool = False) -> dict:
    """What the evaluator makes of these logits; a row has a length of its own, so that the order
    in which rows are computed is another than theirs."""
    documents, examples = [], []
    for row, targets in enumerate(expected):
        place = range(len(targets)) if task == "token_classification" else [LAST] * len(targets)
        labels = np.array([(p, t, 1) for p, t in zip(place, targets, strict=True)], LABEL)
        length = 20 + (row * 7) % 11
        documents.append(
            Document(
                np.full(length, row, np.int32), np.zeros(length, np.float32), f"row {row}", labels
            )
        )
        examples.append(Example(f"row {row}", text="x", target=Labels(tuple(targets), many)))
    said = [torch.from_numpy(np.asarray(each, np.float32)) for each in logits]
    classes = Classes(tuple(f'"{name}"' for name in NAMES), np.ones(len(NAMES)), many)
    return HeadEvaluator(
        task=task,
        metrics=TASK_METRICS[task],
        documents=documents,
        examples=examples,
        tokenizer=None,
        classes=None if task == "regression" else classes,
        outputs=lambda model, batch: [(said[int(d.ids[0])], (float(d.ids[0]), 2.0)) for d in batch],
        micro_batch_tokens=100,
    ).measure(Model())


def values(found: dict) -> dict[str, float]:
    return {name: each["value"] for name, each in found["metrics"].items()}


def test_single_classes() -> None:
    expected = random.integers(0, 3, 60)  # "rare" is never expected and never said
    logits = random.normal(size=(60, 1, 4)) + 2 * np.eye(4)[expected][:, None]
    logits[..., 3] = -9
    said = logits[:, 0].argmax(-1)
    found = measured("sequence_classification", expected[:, None], logits)
    assert 0.2 < values(found)["accuracy"] < 0.95
    assert values(found) == pytest.approx(
        {
            "loss": np.arange(60).sum() / 120,
            "accuracy": metrics.accuracy_score(expected, said),
            "macro_f1": metrics.f1_score(expected, said, average="macro"),
            "micro_f1": metrics.f1_score(expected, said, average="micro"),
        }
    )
    assert found["confusion"] == {
        "labels": list(NAMES),
        "counts": metrics.confusion_matrix(expected, said, labels=range(4)).tolist(),
    }
    pairs = [(each["reference"], each["answer"]) for each in found["answers"]]
    assert pairs == [(NAMES[e], NAMES[s]) for e, s in zip(expected, said, strict=True)]


def test_several_classes() -> None:
    holds = random.random((60, 4)) < [0.5, 0.3, 0.4, 0.2]
    logits = random.normal(size=(60, 1, 4)) + 2 * holds[:, None] - 1
    said = logits[:, 0] >= 0
    assert not holds.any(-1).all()  # some rows have no class
    assert not said.any(-1).all()
    expected = [np.flatnonzero(row).tolist() or [NO_CLASS] for row in holds]
    found = measured("sequence_classification", expected, logits, many=True)
    assert (
        holds
        == MultiLabelBinarizer(classes=range(4)).fit_transform(
            [[c for c in row if c >= 0] for row in expected]
        )
    ).all()
    assert values(found) == pytest.approx(
        {
            "loss": np.arange(60).sum() / 120,
            "accuracy": metrics.accuracy_score(holds, said),
            "macro_f1": metrics.f1_score(holds, said, average="macro", zero_division=0),
            "micro_f1": metrics.f1_score(holds, said, average="micro"),
        }
    )
    assert "confusion" not in found


def test_tags_leave_out_what_is_outside() -> None:
    counts = random.integers(1, 9, 40)
    expected = [random.integers(0, 3, count) for count in counts]
    logits = [random.normal(size=(len(e), 4)) + 2 * np.eye(4)[e] - [0, 0, 0, 9] for e in expected]
    gold, said = np.concatenate(expected), np.concatenate([each.argmax(-1) for each in logits])
    found = measured("token_classification", expected, logits)
    assert values(found) == pytest.approx(
        {
            "loss": np.arange(40).sum() / 80,
            "accuracy": metrics.accuracy_score(gold, said),
            "macro_f1": metrics.f1_score(gold, said, average="macro", labels=[0, 1]),
            "micro_f1": metrics.f1_score(gold, said, average="micro", labels=[0, 1]),
        }
    )
    matrix = metrics.confusion_matrix(gold, said, labels=range(4))
    assert found["confusion"]["counts"] == matrix.tolist()


def test_numbers() -> None:
    expected = (random.normal(size=50) * 3 + 20).astype(np.float32)
    said = (expected + random.normal(size=50)).astype(np.float32)
    found = values(measured("regression", expected[:, None], said[:, None, None]))
    assert found["mae"] == pytest.approx(metrics.mean_absolute_error(expected, said))
    assert found["pearson"] == pytest.approx(np.corrcoef(expected, said)[0, 1])


def test_the_correlation_of_far_and_of_small_numbers() -> None:
    """Years, and shares of a millionth: neither is lost in rounding."""
    for scale, shift in ((1, 2000), (1e-6, 0), (1e-6, 1e-3)):
        expected = (random.normal(size=30) * scale + shift).astype(np.float32)
        said = (expected + random.normal(size=30) * scale).astype(np.float32)
        found = values(measured("regression", expected[:, None], said[:, None, None]))
        assert found["pearson"] == pytest.approx(np.corrcoef(expected, said)[0, 1], abs=1e-3)


def test_a_side_that_does_not_vary_has_no_correlation() -> None:
    expected = np.arange(10.0)[:, None]
    for constant in (0.0, 0.1, 2000.1):
        found = measured("regression", expected, np.full((10, 1, 1), constant))
        assert values(found)["pearson"] == 0


def test_every_metric_of_a_head_is_tested_in_its_own_direction() -> None:
    """More right answers are better; a smaller error is."""
    from llamaweft.evaluate.curves import lower_is_better

    named = {
        name
        for task, names in TASK_METRICS.items()
        if task not in ("chat", "text")
        for name in names
    }
    better_low = {name for name in named if lower_is_better(name)}
    assert better_low == {"loss", "mae"}
    worse, better = [(2.0, 1.0)] * 8, [(1.0, 1.0)] * 8
    assert compare(worse, better, HEAD_SCORES["mae"], lower_is_better=True).verdict == "better"
    assert HEAD_SCORES["accuracy"] is ratio


def test_of_two_rewards_the_better_text_must_have_more() -> None:
    """Equal ones are not right, as trl counts them."""
    rewards = [[0.5, 0.25], [-1, -2], [0.5, 0.5], [0, 1]]
    documents, examples = [], []
    for row in range(len(rewards)):
        labels = np.array([(2, 1, 0.5), (5, -1, 0.5)], LABEL)
        ids, weights = np.full(6 + row, row, np.int32), np.zeros(6 + row, np.float32)
        documents.append(Document(ids, weights, f"row {row}", labels, 3))
        sides = (({"role": "assistant", "content": text},) for text in ("yes", "no"))
        asked = ({"role": "user", "content": f"q {row}"},)
        examples.append(Example(f"row {row}", asked, target=Preference(*sides)))
    found = HeadEvaluator(
        task="reward",
        metrics=TASK_METRICS["reward"],
        documents=documents,
        examples=examples,
        tokenizer=None,
        classes=None,
        outputs=lambda model, batch: [
            (torch.tensor(rewards[int(d.ids[0])])[:, None], (float(d.ids[0]), 1.0)) for d in batch
        ],
        micro_batch_tokens=14,
    ).measure(Model())
    assert values(found) == {"loss": 1.5, "accuracy": 0.5}
    assert found["parts"]["accuracy"] == [[1, 1], [1, 1], [0, 1], [0, 1]]
    assert found["answers"][1] == {
        "where": "row 1",
        "prompt": "q 1",
        "reference": "chosen: yes\nrejected: no",
        "answer": "chosen -1, rejected -2 (+1)",
    }
    assert "confusion" not in found


def test_an_answer_is_measured_against_the_nearest_of_the_references(tokenizer) -> None:
    """As SQuAD's evaluation does: without articles, case and punctuation, the best of all."""
    context = "The Nile, in Egypt, is long."
    target = Span("Which river?", context, ("Egypt", "The Nile"), (13, 0))
    example = Example("a row", target=target)
    encoding = tokenizer.backend_tokenizer.encode(target.question, context)
    logits = torch.zeros(len(encoding.ids), 2)
    logits[encoding.char_to_token(4, 1), 0] = 5  # "Nile,": neither article nor punctuation count
    logits[encoding.char_to_token(8, 1), 1] = 5
    labels = np.array([(1, 0, 0.5), (1, 1, 0.5)], LABEL)
    ids = np.array(encoding.ids, np.int32)
    evaluator = HeadEvaluator(
        task="question_answering",
        metrics=["exact_match", "f1"],
        documents=[Document(ids, np.zeros(len(ids), np.float32), "a row", labels)],
        examples=[example],
        tokenizer=tokenizer,
        classes=None,
        outputs=lambda model, documents: [(logits, (1.0, 1.0))],
        micro_batch_tokens=100,
    )
    found = evaluator.measure(torch.nn.Module())
    assert found["answers"][0]["answer"] == "Nile,"
    assert {name: value["value"] for name, value in found["metrics"].items()} == {
        "exact_match": 1.0,
        "f1": 1.0,
    }
