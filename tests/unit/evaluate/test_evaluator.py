"""What a measurement keeps of each row, and the paired test of two of them."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from llamaweft.data.example import Example
from llamaweft.errors import UserError
from llamaweft.evaluate.evaluator import Answer, Evaluator, side_by_side

ROWS = 40
REFERENCES = [f"the lamp number {i} is on the table in the hall" for i in range(ROWS)]


class Told(Evaluator):
    """An evaluator whose model is the list of its answers, and of its losses in nats."""

    def answers(self, model: Any, progress: Any = None) -> list[Answer]:
        rows = zip(REFERENCES, model.said, strict=True)
        return [Answer(f"rows:{i}", f"question {i}", r, a) for i, (r, a) in enumerate(rows, 1)]


def evaluator(*metrics: str) -> Told:
    lengths = np.random.default_rng(0).integers(5, 20, ROWS)
    return Told(
        metrics=metrics,
        documents=[SimpleNamespace(ids=np.zeros(n), index=i) for i, n in enumerate(lengths)],
        examples=[
            Example(f"rows:{i}", ({"role": "user", "content": "?"}, {"role": "assistant", "content": r}))
            for i, r in enumerate(REFERENCES, 1)
        ],
        tokenizer=None,
        loss_parts=lambda model, batch: [(model.nats[d.index], model.weights[d.index]) for d in batch],
        max_rows=ROWS,
        max_new_tokens=8,
        micro_batch_tokens=64,
        cache_bytes=lambda: 0,
    )  # fmt: skip


def model(wrong: int, nats: float = 8.0, weight: float = 4.0) -> Any:
    """The first `wrong` answers miss their last four words."""
    said = [" ".join(r.split()[:-4]) if i < wrong else r for i, r in enumerate(REFERENCES)]
    noise = np.random.default_rng(1).normal(0, 0.1, ROWS)
    losses, weights = (nats + noise).tolist(), [weight + i % 3 for i in range(ROWS)]
    return SimpleNamespace(said=said, nats=losses, weights=weights, eval=lambda: None)


ALL = ("loss", "perplexity", "exact_match", "rouge1", "bleu", "chrf")


def test_every_rows_parts_are_kept_as_lists_of_floats() -> None:
    found = evaluator(*ALL).measure(model(wrong=20))
    assert list(found["metrics"]) == list(ALL)
    assert set(found["parts"]) == set(ALL) - {"perplexity"}  # it takes those of the loss
    for rows in found["parts"].values():
        assert len(rows) == ROWS
        assert all(type(number) is float for row in rows for number in row)
    assert json.loads(json.dumps(found)) == found  # as a checkpoint keeps it
    assert found["metrics"]["exact_match"]["value"] == 0.5
    loss = found["metrics"]["loss"]["value"]
    assert found["metrics"]["perplexity"]["value"] == pytest.approx(np.exp(loss))


def test_better_and_worse_are_of_the_metrics_own_direction() -> None:
    measure = evaluator(*ALL).measure
    weak, strong = measure(model(30, nats=9)), measure(model(10, nats=8))
    better = side_by_side(weak, strong)
    worse = side_by_side(strong, weak)
    same = side_by_side(weak, weak)
    for name in ALL:
        assert better["difference"][name]["verdict"] == "better"
        assert worse["difference"][name]["verdict"] == "worse"
        assert same["difference"][name]["verdict"] == "no difference shown"
        one = better["difference"][name]
        sides = [better[side]["metrics"][name]["value"] for side in ("before", "after")]
        assert one["value"] == pytest.approx(sides[1] - sides[0])
        assert one["low"] < one["value"] < one["high"] or name == "loss"
    assert better["difference"]["loss"]["high"] < 0 < better["difference"]["bleu"]["low"]


def test_the_content_that_was_there_stays() -> None:
    measure = evaluator("exact_match").measure
    before, after = measure(model(30)), measure(model(10))
    content = side_by_side(before, after)
    assert list(content) == ["name", "before", "after", "examples", "difference"]
    assert content["before"] == {"metrics": before["metrics"]}
    assert content["after"] == {"metrics": after["metrics"]}
    assert len(content["examples"]) == 20
    assert content["examples"][1] == {
        "where": "rows:3",
        "prompt": "question 3",
        "reference": REFERENCES[2],
        "before": "the lamp number 2 is on the",
        "after": "the lamp number 2 is on the",
    }


def test_one_side_alone_is_not_compared() -> None:
    content = side_by_side(evaluator("exact_match").measure(model(30)), None)
    assert content["after"] is None
    assert "difference" not in content
    assert list(content["examples"][0]) == ["where", "prompt", "reference", "before"]


def test_a_measurement_without_parts_is_shown_without_a_test() -> None:
    """A checkpoint of an older version holds none."""
    measure = evaluator("exact_match").measure
    before = measure(model(30))
    del before["parts"]
    assert "difference" not in side_by_side(before, measure(model(10)))


def test_losses_on_other_tokens_are_not_compared() -> None:
    """Two tokenizers give the documents other weights, or cut them into another number."""
    measure = evaluator("loss", "exact_match").measure
    before, other = measure(model(30)), measure(model(10, nats=7, weight=5))
    assert list(side_by_side(before, other)["difference"]) == ["exact_match"]
    other["parts"]["loss"] = before["parts"]["loss"][1:]
    assert list(side_by_side(before, other)["difference"]) == ["exact_match"]


def test_a_metric_without_its_library_or_module_is_told_before_the_start(monkeypatch) -> None:
    evaluator(*ALL).check()
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    with pytest.raises(UserError, match=r"bleu needs sacrebleu.*llamaweft\[metrics\]"):
        evaluator("loss", "bleu").check()
    with pytest.raises(UserError, match="no_such_module cannot be imported"):
        evaluator("no_such_module:metric").check()


def test_the_row_is_named_where_a_users_metric_gives_no_number(tmp_path, monkeypatch) -> None:
    code = "def metric(answer, reference): return float('nan') if ' 7 ' in reference else 1\n"
    (tmp_path / "nan_at_seven.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=r"nan_at_seven:metric returned nan.* the row rows:8"):
        evaluator("nan_at_seven:metric").measure(model(0))
