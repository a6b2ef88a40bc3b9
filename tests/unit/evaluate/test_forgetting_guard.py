"""The guard's numbers, its budget, and what reports say of both."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from llamaweft.data.general import AREAS, General, GeneralPrompt
from llamaweft.evaluate.forgetting import KL, LOSS, ForgettingGuard, forgetting_notes
from llamaweft.evaluate.report import ReportInput, write_report

SIGN = '<span class="sign tone">{}</span>'
EVIL = "<script>alert(1)</script> | `x` **b**"


@dataclass
class Row:
    kl: float
    before: float
    after: float
    labels: int


def guard_of(rows: list[Row], max_kl: float | None = None, when: str = "stop") -> ForgettingGuard:
    count = len(rows) // len(AREAS)
    prompts = [
        GeneralPrompt(a, f"{a} {i}?", f"{a} {i}!", f"{a} {i}") for a in AREAS for i in range(count)
    ]
    documents = [SimpleNamespace(trained_tokens=row.labels) for row in rows]
    return ForgettingGuard(
        general=General(prompts, documents, [[1]] * len(prompts)),  # type: ignore[arg-type]
        tokenizer=None,
        compare=lambda model: rows,
        max_kl=max_kl,
        when_exceeded=when,
        answered=5,
        max_new_tokens=4,
        cache_bytes=lambda: 0,
    )  # fmt: skip


def rows_of(count: int = 50) -> list[Row]:
    """Prompts of 2 to 6 tokens; each token moved 0.1 nats (0.3 in the last area) and lost 1."""
    made = []
    for i in range(count):
        labels, far = 2 + i % 5, i >= count * 4 // 5
        made.append(Row((0.3 if far else 0.1) * labels, 5.0 * labels, 6.0 * labels, labels))
    return made


MODEL = SimpleNamespace(eval=lambda: None)


def test_values_are_means_over_tokens() -> None:
    metrics = guard_of(rows_of()).measure(MODEL)["metrics"]
    assert metrics[KL]["value"] == pytest.approx((4 * 0.1 + 0.3) / 5)
    assert metrics[KL]["low"] < metrics[KL]["value"] < metrics[KL]["high"]
    assert metrics[LOSS]["value"] == pytest.approx(6)
    assert metrics[LOSS]["count"] == 50
    uneven = [Row(1, 1, 1, 1), *[Row(0, 0, 0, 3)] * 4]
    assert guard_of(uneven).measure(MODEL)["metrics"][KL]["value"] == pytest.approx(1 / 13)


def test_each_area_has_its_own_numbers_and_verdict() -> None:
    guard = guard_of(rows_of(), max_kl=0.2)
    content = guard.content(guard.measure(MODEL), ["old"] * 5, ["new"] * 5)
    assert (content["prompts"], content["tokens"]) == (50, 200)
    assert content["areas"]["facts"]["kl"]["value"] == pytest.approx(0.1)
    assert content["areas"]["safety"]["kl"]["value"] == pytest.approx(0.3)
    assert content["areas"]["safety"]["kl"]["count"] == 10
    assert content["loss"]["difference"]["value"] == pytest.approx(1)
    assert content["loss"]["difference"]["verdict"] == "worse"
    assert [e["where"] for e in content["examples"]] == [f"{area} 0" for area in AREAS]
    assert content["examples"][0] == {
        "where": "facts 0", "prompt": "facts 0?", "reference": "facts 0!", "before": "old", "after": "new",
    }  # fmt: skip


def test_the_budget_is_kept_up_to_its_value_and_by_no_number_that_is_none() -> None:
    def within(value: float, max_kl: float | None) -> bool:
        return guard_of(rows_of(5), max_kl).within({KL: {"value": value}})

    assert within(0.2, 0.2)
    assert not within(0.2001, 0.2)
    assert not within(math.nan, 0.2)
    assert not within(math.inf, 0.2)
    assert within(math.inf, None)
    assert within(math.nan, None)


def report_of(tmp_path, content: dict, notes=()) -> list[str]:
    evaluation = {
        "name": "held-out rows", "before": {"metrics": {}}, "after": {"metrics": {}}, "examples": [],
        "forgetting": content,
    }  # fmt: skip
    run = ReportInput(
        title="run", command="", recipe_yaml="", environment={}, audit={}, plan={},
        metrics=[{"kind": "validation", "step": 3, KL: 0.0125, LOSS: 6.0}],
        evaluations=[evaluation], notes=notes,
    )  # fmt: skip
    write_report(run, tmp_path / "report.html", tmp_path / "report.md")
    return [(tmp_path / f"report.{kind}").read_text() for kind in ("html", "md")]


def test_a_report_shows_numbers_budget_and_answers_and_holds_what_they_say(tmp_path) -> None:
    guard = guard_of(rows_of(), max_kl=0.2)
    content = guard.content(guard.measure(MODEL), [EVIL] * 5, ["a new answer"] * 5)
    page, text = report_of(tmp_path, content | {"step": 3, "stopped_at_step": None})
    assert "<script>alert" not in page
    assert "&lt;script&gt;" in page
    for report in (page, text):
        assert "Budget: a KL of 0.2 nats per token, kept by the weights of step 3." in report
        assert "50 general prompts, 200 tokens of reference answers" in report
        assert "0.140" in report  # not 14.0%: a divergence is no share
        assert "safety" in report
        assert "a new answer" in report
        assert "worse" in report
    assert "<mark>a new answer</mark>" in page
    assert SIGN.format("✓") in page
    assert "1 more" not in page
    assert "2 more" in page


def test_a_report_says_when_nothing_kept_the_budget_and_when_a_run_was_ended(tmp_path) -> None:
    guard = guard_of(rows_of(), max_kl=0.01)
    content = guard.content(guard.measure(MODEL), [""] * 5, [""] * 5)
    none = content | {"step": 0, "stopped_at_step": 4}
    notes = forgetting_notes(none, "adapter/")
    assert len(notes) == 2
    for report in map(html.unescape, report_of(tmp_path, none, notes)):
        assert "No evaluation kept within it, so the weights are those of the run's start" in report
        assert "The run was ended at step 4" in report
        assert "so adapter/ holds the model as the run began" in report
    assert SIGN.format("!") in (tmp_path / "report.html").read_text()
    assert forgetting_notes(content | {"step": 2, "stopped_at_step": None}, "adapter/") == []
    assert forgetting_notes(None, "adapter/") == []


def test_without_a_budget_none_is_spoken_of(tmp_path) -> None:
    guard = guard_of(rows_of())
    content = guard.content(guard.measure(MODEL), [""] * 5, [""] * 5)
    assert content["when_exceeded"] is None
    for report in report_of(tmp_path, content | {"step": 3, "stopped_at_step": None}):
        assert "50 general prompts" in report
        assert "udget" not in report
    assert forgetting_notes(content | {"step": 0}, "adapter/") == []
