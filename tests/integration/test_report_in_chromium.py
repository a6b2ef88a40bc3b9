"""The report in headless Chromium: whatever a run holds is shown as text, and nothing of it runs."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from conftest import SIX_SHORT_STEPS, write_recipe
from said import all_said
from test_audit_page_in_chromium import Browser, browser, pytestmark  # noqa: F401 (a fixture, a mark)

from llamaweft.evaluate.report import ReportInput, write_report

RUNS = "window.marked=1;document.title='broken';alert(1)"
EVIL = (
    f'</script></style></textarea></title><script>{RUNS}</script><img src=x onerror="{RUNS}">'
    f'<svg onload="{RUNS}"><a href="javascript:{RUNS}">x</a><iframe src="javascript:{RUNS}"></iframe>'
    "<base href=//host><form action=//host><input name=a></form><!-- {{ 7*7 }} {% raw %} &lt;b&gt; \u202e"
)
TRIED = """
    const found = document.querySelectorAll("img, iframe, base, form, object, embed, [onload], [onerror]").length;
    const links = [...document.links].filter(link => !link.getAttribute("href").startsWith("#")).length;
    return [window.marked === undefined, document.scripts.length, found, links];"""


def measured(value: float) -> dict:
    return {"value": value, "low": value - 0.1, "high": value + 0.1, "count": 9}


def evil_report() -> ReportInput:
    """Evil in every place that data, a recipe or a model can fill."""
    example = dict.fromkeys(("prompt", "reference", "before", "after"), EVIL)
    side = {"metrics": {EVIL: measured(0.5), "loss": measured(1.0)}}
    area = {
        "loss": {
            "before": measured(1),
            "after": measured(1),
            "difference": measured(0.2) | {"verdict": EVIL},
        },
        "kl": measured(0.1),
    }
    return ReportInput(
        title=EVIL,
        command=EVIL,
        recipe_yaml=EVIL,
        environment={EVIL: EVIL, "device": {EVIL: [EVIL]}},
        audit={
            "findings": [{"check": EVIL, "status": EVIL, "count": 1, "share": 0.5, "examples": [EVIL], "remedy": EVIL}],
            "rows": 1, "validation_rows": 1, "tokens": 1, "trained_tokens": 1, "longest_tokens": 1, "passed": False,
        },
        plan={EVIL: EVIL, "parts": {EVIL: EVIL}},
        metrics=[
            {"kind": "train", "step": step, "loss": 1.0, "lr": 0.1, "seconds": 1.0, "tokens": 1} for step in (1, 2)
        ] + [{"kind": "validation", "step": 1, EVIL: 0.5}, {"kind": "validation", "step": 2, EVIL: 0.6}],
        evaluations=[
            {
                "name": EVIL,
                "before": side,
                "after": side,
                "difference": {EVIL: measured(0.1) | {"verdict": EVIL}},
                "confusion": {"after": {"labels": [EVIL, "b"], "counts": [[1, 2], [3, 4]]}},
                "examples": [example],
                "forgetting": area | {"prompts": 3, "tokens": 30, "areas": {EVIL: area}, "examples": [example]},
            }
        ],
        notes=[EVIL],
    )  # fmt: skip


def test_a_report_of_evil_is_text(browser: Browser, tmp_path: Path) -> None:  # noqa: F811
    write_report(evil_report(), tmp_path / "report.html", tmp_path / "report.md")
    browser.open(tmp_path / "report.html")
    time.sleep(0.3)
    assert browser.run(TRIED) == [True, 0, 0, 0]
    assert browser.run("return document.title") == f"{EVIL}: training report"
    text = browser.run("return document.body.textContent")
    assert text.count(EVIL) >= 20


def test_a_script_that_got_into_a_report_would_not_run(browser: Browser, tmp_path: Path) -> None:  # noqa: F811
    write_report(evil_report(), tmp_path / "report.html", tmp_path / "report.md")
    page = tmp_path / "report.html"
    planted = f'<script>{RUNS}</script><img src=x onerror="{RUNS}"></body>'
    page.write_text(page.read_text(encoding="utf-8").replace("</body>", planted), encoding="utf-8")
    browser.open(page)
    time.sleep(0.3)
    assert browser.run("return [window.marked === undefined, document.scripts.length]") == [True, 1]


@pytest.fixture
def evil_run(tiny_folder: Path, tmp_path: Path, monkeypatch, capsys) -> Path:
    """A run folder with an evil name, of a file with an evil name, rows and classes."""
    monkeypatch.chdir(tmp_path)
    named = "<img src=x onerror=window.marked=1>"
    rows = [{"text": f"{EVIL} {n}", "label": f"{EVIL} {n % 2}"} for n in range(24)]
    (tmp_path / f"{named}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    tree = {
        "model": str(tiny_folder),
        "task": "sequence_classification",
        "data": {"train": [{"path": f"{named}.jsonl"}], "validation": {"fraction": 0.3}},
        "audit": {"allow": ["validation_leak"]},
        "adapter": {"r": 2},
        "base_weights": "fp32",
        "training": SIX_SHORT_STEPS | {"max_steps": 2, "compute_dtype": "fp32"},
        "evaluation": {"every_steps": None, "metrics": ["loss", "accuracy"]},
        "output_dir": named,
    }
    recipe = write_recipe(tree, tmp_path / "recipe.yaml")
    for arguments in (("train", recipe), ("data", "audit", recipe, "--html", "audit.html")):
        code, said = all_said(monkeypatch, capsys, *arguments)
        assert code == 0, said
    return tmp_path / named


def test_pages_of_a_run_of_evil_are_text(browser: Browser, evil_run: Path) -> None:  # noqa: F811
    browser.open(evil_run / "report.html")
    time.sleep(0.3)
    assert browser.run(TRIED) == [True, 0, 0, 0]
    assert f"{EVIL} 0" in browser.run("return document.body.textContent")
    browser.open(evil_run.parent / "audit.html")
    browser.wait("return !document.querySelector('.plain')")
    found = browser.run(TRIED)
    assert (found[0], found[1], found[3]) == (True, 2, 0)  # its own data and script
    seen = EVIL.replace("\u202e", "\\u202e")  # which the page writes out
    assert f"{seen} 0" in browser.run("return document.body.textContent")
