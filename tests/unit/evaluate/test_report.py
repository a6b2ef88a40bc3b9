"""The report: nothing that data holds breaks out, verdicts are earned, missing pieces are fine."""

from __future__ import annotations

import dataclasses
import re
import time
from itertools import pairwise

import pytest
from html_page import WellFormed

from llamaweft.evaluate import curves
from llamaweft.evaluate.report import ReportInput, differences, metric_table, write_report
from llamaweft.evaluate.report_markdown import escape, fenced, table
from llamaweft.evaluate.report_metrics import compare_metrics

EVIL = "<script>alert(1)</script></td></table></pre>\"'> & | `x` ``` ![i](u) **b**\n| a | b |"


class Page(WellFormed):
    """The text of a page, and what of it is marked."""

    void = frozenset({"meta", "br", "link", "img", "input", "hr"})

    def __init__(self, text):
        self.text, self.mark = "", []
        super().__init__(text)

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "title"):
            self.text += data
        if self.open and self.open[-1] == "mark":
            self.mark.append(data)


def measured(value, low=None, high=None, count=300):
    interval = {} if low is None else {"low": low, "high": high}
    return {"value": value, "count": count} | interval


def compared(name, before, after, test=None):
    tested = {} if test is None else {"difference": {name: test}}
    return {
        "name": "validation",
        "before": {"metrics": {name: before}},
        "after": after and {"metrics": {name: after}},
    } | tested


def difference(value, low, high, verdict):
    return {"value": value, "low": low, "high": high, "verdict": verdict}


def train_record(step, **changes):
    record = {
        "kind": "train",
        "step": step,
        "loss": 3.0 / step,
        "lr": 2e-4,
        "grad_norm": 1.5,
        "tokens": 1000,
        "computed_tokens": 900,
        "trained_tokens": 100,
        "seconds": 2.0,
        "tokens_per_second": 500.0,
        "useful_flops_per_second": 5e9,
        "anon_bytes": 2**30 + step * 2**20,
        "rss_bytes": 2**31,
        "device_bytes": 0,
    }
    return record | changes


def full_run(**changes):
    finding = {"check": "too_long", "status": "passed", "count": 0, "share": 0.0, "examples": []}
    run = ReportInput(
        title="runs/demo",
        command="llamaweft train recipe.yaml",
        recipe_yaml="model: builtin:smollm2-135m\n",
        environment={"torch": "2.9", "device": {"type": "cpu"}},
        audit={
            "findings": [
                finding | {"remedy": "passed advice"},
                finding
                | {"check": "duplicate", "status": "warning", "count": 4, "share": 0.04}
                | {"examples": ["a.jsonl:3"], "remedy": "there more than once"},
            ],
            "rows": 100,
            "validation_rows": 5,
            "tokens": 2000,
            "trained_tokens": 500,
            "longest_tokens": 60,
            "passed": True,
        },
        plan={"seconds_per_step": 4.0, "peak_bytes": 2**31, "parts": {"weights": 2**29}},
        metrics=[
            *(train_record(step) for step in range(1, 101)),
            {"kind": "validation", "step": 50, "loss": 0.5, "exact_match": 0.25},
        ],
        evaluations=[
            compared(
                "exact_match",
                measured(0.01, 0.0, 0.03),
                measured(0.8, 0.75, 0.85),
                difference(0.79, 0.74, 0.84, "better"),
            )
            | {
                "examples": [
                    {
                        "prompt": f"prompt {i}",
                        "reference": "turn the lamp on",
                        "before": "turn the radio on",
                        "after": "turn the lamp on",
                    }
                    for i in range(25)
                ]
            }
        ],
    )
    return dataclasses.replace(run, **changes)


def written(run, tmp_path):
    write_report(run, tmp_path / "report.html", tmp_path / "report.md")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.md"]
    return [(tmp_path / f"report.{kind}").read_text(encoding="utf-8") for kind in ("html", "md")]


def rows_of(markdown):
    """Each table as lists of cells, split as a renderer does: at pipes without a backslash."""
    tables, current = [], []
    for line in [*markdown.splitlines(), ""]:
        if line.startswith("|"):
            current.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif current:
            tables.append(current)
            current = []
    return tables


def all_rows(markdown):
    return [row for rows in rows_of(markdown) for row in rows]


# --- verdicts


@pytest.mark.parametrize("verdict", ["better", "worse", "no difference shown"])
def test_the_verdict_is_that_of_the_paired_test(verdict, tmp_path):
    """Whatever the two intervals look like."""
    for after in (measured(0.5, 0.3, 0.6), measured(0.11, 0.0, 0.21)):
        test = difference(0.01, 0.001, 0.02, verdict)
        evaluation = compared("exact_match", measured(0.1, 0.0, 0.2), after, test)
        assert [row[3] for row in metric_table(evaluation)] == [verdict]
        html, markdown = written(full_run(evaluations=[evaluation]), tmp_path)
        for text in (Page(html).text, markdown):
            assert f"(300 held-out rows): {verdict}." in text
            assert "+1.0pp [+0.1pp, +2.0pp]" in text


@pytest.mark.parametrize("test", [None, {}, difference(0.4, 0.3, 0.5, "much better")])
def test_without_a_paired_test_nothing_is_called_better(test, tmp_path):
    """An evaluation.json of an older version holds none."""
    old = compared("exact_match", measured(0.1, 0.0, 0.2), measured(0.5, 0.3, 0.6), test)
    assert metric_table(old) == [
        ("exact_match", "10.0% [0.0%, 20.0%]", "50.0% [30.0%, 60.0%]", "not tested")
    ]
    html, markdown = written(full_run(evaluations=[old]), tmp_path)
    for text in (Page(html).text, markdown):
        assert "→ 50.0% [30.0%, 60.0%] (300 held-out rows): not tested." in text


def test_shares_are_percentages_and_losses_are_numbers():
    both = compared("f1", measured(0.015, 0.0, 0.034), measured(0.8, 0.75, 0.85))
    both["before"]["metrics"]["loss"] = measured(2.41349, 2.3, 2.5)
    both["after"]["metrics"]["loss"] = measured(0.02134, 0.01, 0.03)
    both["before"]["metrics"]["my_package:closeness"] = measured(0.5, 0.4, 0.6)
    both["after"]["metrics"]["my_package:closeness"] = measured(0.7, 0.6, 0.8)
    both["before"]["metrics"]["accuracy"] = measured(0.5)
    both["difference"] = {
        "f1": difference(0.785, 0.7, 0.86, "better"),
        "loss": difference(-2.3921, -2.5, -2.3, "better"),
        "my_package:closeness": difference(0.2, -0.01, 0.3, "no difference shown"),
    }
    assert metric_table(both) == [
        ("f1", "1.5% [0.0%, 3.4%]", "80.0% [75.0%, 85.0%]", "better"),
        ("loss", "2.413 [2.300, 2.500]", "0.0213 [0.0100, 0.0300]", "better"),
        (
            "my_package:closeness",
            "0.500 [0.400, 0.600]",
            "0.700 [0.600, 0.800]",
            "no difference shown",
        ),
        ("accuracy", "50.0%", "—", "not compared"),
    ]
    assert [metric["difference"] for metric in compare_metrics(both)] == [
        "+78.5pp [+70.0pp, +86.0pp]",
        "-2.392 [-2.500, -2.300]",
        "+0.200 [-0.010, +0.300]",
        "—",
    ]


def test_after_is_missing():
    assert metric_table(compared("loss", measured(2.0, 1.9, 2.1), None)) == [
        ("loss", "2.000 [1.900, 2.100]", "—", "not compared")
    ]


# --- nothing breaks out


def evil_run():
    evaluation = {
        "name": EVIL,
        "before": {"metrics": {EVIL: measured(0.1, 0.0, 0.2)}},
        "after": {"metrics": {EVIL: measured(0.5, 0.4, 0.6)}},
        "difference": {EVIL: difference(0.4, 0.3, 0.5, EVIL)},
        "examples": [{"prompt": EVIL, "reference": EVIL, "before": EVIL + EVIL, "after": ""}],
    }
    finding = {"check": EVIL, "status": EVIL, "count": 1, "share": 1.0, "examples": [EVIL]}
    return ReportInput(
        title=EVIL,
        command=EVIL,
        recipe_yaml=EVIL,
        environment={EVIL: {EVIL: [EVIL]}},
        audit={"findings": [finding | {"remedy": EVIL}]},
        plan={"parts": {EVIL: 2**20}, EVIL: EVIL},
        metrics=[train_record(1), {"kind": "validation", "step": 1, EVIL: 0.5}],
        evaluations=[evaluation],
    )


def test_html_shows_what_data_holds_as_text(tmp_path):
    html, _ = written(evil_run(), tmp_path)
    page = Page(html)
    assert not {"script", "img", "link", "iframe", "b"} & set(page.elements)
    # title, command, recipe, environment (3), names, prompts, answers, audit, plan, curve
    assert page.text.count("<script>alert(1)</script>") >= 18
    assert page.text.count(EVIL) >= 15
    clean = Page(written(full_run(), tmp_path)[0])
    assert {"html", "main", "section", "table", "svg", "article"} <= set(clean.elements)
    assert set(page.elements) <= set(clean.elements)


def test_html_refers_to_nothing_outside(tmp_path):
    for run in (evil_run(), full_run()):
        html, _ = written(run, tmp_path)
        page = Page(html)
        assert not [name for name, _ in page.attributes if name in ("src", "srcset", "data")]
        assert all(value.startswith("#") for name, value in page.attributes if name == "href")
        assert not [name for name, _ in page.attributes if name.startswith("on")]
        style = html[html.index("<style>") : html.index("</style>")]
        assert "url(" not in style
        assert "@import" not in style


def test_markdown_tables_keep_their_columns(tmp_path):
    for run, tables in ((evil_run(), 8), (full_run(), 8)):
        _, markdown = written(run, tmp_path)
        outside = re.sub(r"^(`{3,})\w*\n.*?\n\1$", "", markdown, flags=re.S | re.M)
        found = rows_of(outside)
        assert len(found) == tables
        for rows in found:
            assert {len(row) for row in rows} == {len(rows[0])}
            assert set(rows[1]) == {"---"}
        assert "<" not in outside


def test_markdown_escapes():
    assert escape("a|b") == "a&#124;b"
    assert escape("`a` <b> *c*") == "\\`a\\` &lt;b&gt; \\*c\\*"
    assert escape("two\nlines\r\nand three") == "two ⏎ lines ⏎ and three"
    assert escape("exact_match _x_ 0.1 [0.0, 0.2]") == "exact_match \\_x\\_ 0.1 [0.0, 0.2]"
    assert escape("![i](u) [a][b]") == "![i\\](u) [a\\][b]"
    assert rows_of(table(("a", "b"), [("x\\", "|y")]))[0][2] == ["x\\\\", "&#124;y"]


def test_a_fence_is_longer_than_what_it_holds():
    assert fenced("a\n````\nb\n", "sh") == "`````sh\na\n````\nb\n`````"
    assert fenced("a", "sh") == "```sh\na\n```"


def test_control_characters_and_lone_surrogates(tmp_path):
    html, markdown = written(full_run(command="a\x1b[2Jb\x00c\ud800d"), tmp_path)
    for text in (html, markdown):
        assert "a\ufffd[2Jb\ufffdc?d" in text


# --- contents


def test_contents_in_both(tmp_path):
    html, markdown = written(full_run(), tmp_path)
    page = Page(html)
    headline = "exact_match on validation: 1.0% [0.0%, 3.0%] → 80.0% [75.0%, 85.0%] (300 held-out"
    for text in (page.text, markdown):
        assert f"{headline} rows): better." in text
        for piece in ("3 min 20 s", "100,000", "10,000", "1.10 GiB", "500.0", "5.0"):  # cost
            assert piece in text
        assert "there more than once" in text
        assert "a.jsonl:3" in text
        assert "passed advice" not in text
        assert "500 of them trained (25.0%)" in text
        assert "device.type" in text
        assert "builtin:smollm2-135m" in text
        assert "prompt 19" in text
        assert "prompt 20" not in text
        assert "20 of 25 answers" in text
    order = ("Held-out metrics", "Curves", "Answers", "What it cost", "Audit", "Plan", "Recipe")
    body = html.split("<main>")[1]
    places = [body.index(f">{heading}") for heading in (*order, "Environment", "Command")]
    assert places == sorted(places)
    assert page.elements.count("article") == 20


def test_plan_against_measurement(tmp_path):
    _, markdown = written(full_run(), tmp_path)
    assert ["Seconds a step", "4 s", "2 s", "0.50"] in all_rows(markdown)
    assert ["Peak memory", "2.00 GiB", "1.10 GiB", "0.55"] in all_rows(markdown)
    on_device = [train_record(1, device_bytes=2**32)]
    _, markdown = written(full_run(metrics=on_device), tmp_path)
    assert ["Peak memory", "2.00 GiB", "4.00 GiB", "2.00"] in all_rows(markdown)
    _, markdown = written(full_run(metrics=[]), tmp_path)
    assert ["Seconds a step", "4 s", "—", "—"] in all_rows(markdown)


def test_differing_words_are_marked(tmp_path):
    assert differences("turn the radio on", "turn the lamp on") == [
        ("turn the ", False),
        ("radio", True),
        (" on", False),
    ]
    assert differences("a b c", "") == [("a b c", True)]
    assert differences("", "a") == []
    assert differences("a, b", "a, b") == [("a, b", False)]
    html, _ = written(full_run(), tmp_path)
    page = Page(html)
    assert page.mark == ["Marked"] + ["radio"] * 20
    assert page.text.count("same as the reference") == 20


def test_a_model_that_repeats_itself_is_compared_at_once():
    start = time.process_time()
    pieces = differences(". " * 2000, "x . " * 1000)
    assert time.process_time() - start < 5  # minutes with every word as an anchor
    assert "".join(text for text, _ in pieces) == ". " * 2000
    assert differences("x " * 2000, "x " * 1999) == [
        ("x " * 1999, False),
        ("x", True),
        (" ", False),
    ]


@pytest.mark.parametrize(("answer", "reference"), [("a b c d e", "b d"), ("b d", "a b c d e")])
def test_the_longer_text_may_be_either(answer, reference):
    same = [piece for piece, differs in differences(answer, reference) if not differs]
    assert "".join(same).split() == ["b", "d"]


@pytest.mark.parametrize(
    "changes",
    [
        {"evaluations": []},
        {"metrics": []},
        {"metrics": [train_record(1)]},
        {"metrics": [train_record(1, loss=float("nan"), grad_norm=None)]},
        {"metrics": [{"kind": "validation", "step": 0, "loss": 2.0}]},
        {"audit": {}, "plan": {}, "environment": {}},
        {"plan": {"seconds_per_step": None, "parts": None}},
        {"title": "", "command": "", "recipe_yaml": ""},
        {"evaluations": [compared("loss", measured(2.0, 1.9, 2.1), None)]},
        {"evaluations": [{"name": "v", "before": {"metrics": {}}, "after": None, "examples": []}]},
        {
            "evaluations": [
                compared("f1", measured(0.1), None)
                | {"examples": [{"prompt": "p", "reference": "r", "before": "b", "after": None}]}
            ]
        },
    ],
)
def test_missing_pieces(changes, tmp_path):
    html, markdown = written(full_run(**changes), tmp_path)
    page = Page(html)
    assert page.elements.count("h1") == 1
    assert markdown.startswith("# ")
    for text in (page.text, markdown):
        assert not re.search(r"\b(nan|None|inf)\b", text)
    # a heading stands only over something
    assert not re.search(r"</h2>\s*</section>", html)
    assert not re.search(r"^## .*\n\n(?=## |\Z)", markdown, flags=re.M)


def test_a_failed_write_leaves_the_old_report(tmp_path, monkeypatch):
    old, _ = written(full_run(), tmp_path)

    def fail(*_):
        raise OSError("disk is full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk is full"):
        write_report(full_run(title="new"), tmp_path / "report.html", tmp_path / "report.md")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == old
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.md"]


# --- curves


def test_panels_of_a_run():
    drawn = curves.panels(full_run().metrics)
    assert [panel.title for panel in drawn] == [
        "Training loss, nats per token",
        "exact_match, %",
        "Learning rate",
        "Gradient norm before clipping",
        "Tokens per second",
        "Process memory, GiB",
    ]
    raw, smooth, held_out = drawn[0].series
    assert (len(raw.points), smooth.label, held_out.points) == (
        100,
        "mean of 5 steps",
        [(50, 0.5)],
    )
    assert smooth.points[9][1] == pytest.approx(sum(3.0 / s for s in range(8, 13)) / 5)
    assert drawn[1].series[0].points == [(50, 25.0)]


def test_a_line_stays_inside_its_panel_and_keeps_spikes():
    records = [train_record(s, loss=50.0 if s == 4321 else 1.0) for s in range(1, 10001)]
    panel = curves.panels(records)[0]
    spots = [
        (float(x), float(y))
        for d in re.findall(r'class="(?:raw|smooth)" d="([^"]*)"', panel.svg)
        for x, y in re.findall(r"([-\d.]+) ([-\d.]+)", d)
    ]
    assert all(0 <= x <= curves.WIDTH and 0 <= y <= curves.HEIGHT for x, y in spots)
    assert len(spots) < 3 * curves.MAX_POINTS
    top = 100 * (1 - min(y for _, y in spots) / curves.HEIGHT)
    assert top >= next(t.percent for t in panel.y_ticks if t.label == "40")


def test_steps_without_a_finite_loss_are_counted():
    records = [train_record(s, loss=float("inf") if s % 2 else 1.0) for s in range(1, 11)]
    assert curves.panels(records)[0].lost == 5


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0, 2e-4), (0.11, 2.4), (0, 3760), (5.0, 5.0), (0, 0), (-3, 8)]
)
def test_ticks_enclose_the_values_in_round_steps(low, high):
    ticks = curves._nice_ticks(low, high)
    assert ticks[0] <= low
    assert ticks[-1] >= high
    assert 3 <= len(ticks) <= 7
    steps = {f"{b - a:.6e}" for a, b in pairwise(ticks)}
    assert len(steps) == 1
    assert steps.pop()[0] in "125"


def test_short_numbers():
    numbers = [0, 2e-4, 1.5e-4, 0.1, 2.413, 842.21, 3549.2, 2.5e6]
    shown = ["0", "2e-4", "1.5e-4", "0.1", "2.41", "842", "3,549", "2.5e6"]
    assert [curves.short(number) for number in numbers] == shown
