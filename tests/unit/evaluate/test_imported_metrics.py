"""Metrics of other libraries give those libraries' own numbers; a user's metric is held to them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

from llamaweft.errors import UserError
from llamaweft.evaluate.bootstrap import RESAMPLES, compare, summarise
from llamaweft.evaluate.imported_metrics import NoNumberError
from llamaweft.evaluate.metrics import answer_metric


def real_texts() -> tuple[list[str], list[str]]:
    """200 answers to public questions, half Swedish and half English, and what stands for a
    model's: with the end left out, in capitals, the same, another row's, and nothing."""
    folder = files("zaragoza_construction_faq") / "data"
    references = []
    for name in ("faq.jsonl", "faq-en.jsonl"):
        lines = (folder / name).read_text("utf-8").splitlines()[:100]
        references += [json.loads(line)["a"] for line in lines]
    answers = []
    for index, text in enumerate(references):
        words = text.split()
        kinds = (" ".join(words[: -2 - index % 5]), text.upper(), text, references[index - 1])
        answers.append("" if index % 17 == 0 else kinds[index % 4])
    return answers, references


@pytest.mark.parametrize("name", ["rouge1", "rouge2", "rougeL"])
def test_rouge_is_the_mean_of_rouge_score(name: str) -> None:
    from rouge_score.rouge_scorer import RougeScorer

    answers, references = real_texts()
    metric, scorer = answer_metric(name), RougeScorer([name], use_stemmer=False)
    value = summarise(list(map(metric.row, answers, references)), metric.score).value
    each = [scorer.score(r, a)[name].fmeasure for a, r in zip(answers, references, strict=True)]
    assert value == pytest.approx(sum(each) / 200, rel=1e-12)
    assert 0.2 < value < 0.9


@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_a_corpus_score_is_sacrebleus(name: str) -> None:
    import sacrebleu

    answers, references = real_texts()
    metric = answer_metric(name)
    rows = [list(row) for row in map(metric.row, answers, references)]
    theirs = {"bleu": sacrebleu.corpus_bleu, "chrf": sacrebleu.corpus_chrf}[name]
    value = summarise(rows, metric.score)
    assert value.value == pytest.approx(theirs(answers, [references]).score / 100, rel=1e-12)
    assert 0.2 < value.value < 0.9
    assert value.low < value.value < value.high


@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_a_draw_of_a_corpus_score_is_that_of_the_drawn_rows(name: str) -> None:
    import sacrebleu

    answers, references = real_texts()
    metric = answer_metric(name)
    counts = np.random.default_rng(0).multinomial(200, np.full(200, 1 / 200), size=RESAMPLES)[7]
    drawn = np.repeat(np.arange(200), counts)
    sums = np.sum([metric.row(answers[i], references[i]) for i in drawn], axis=0)
    theirs = {"bleu": sacrebleu.corpus_bleu, "chrf": sacrebleu.corpus_chrf}[name]
    whole = theirs([answers[i] for i in drawn], [[references[i] for i in drawn]])
    assert metric.score(sums[None].astype(float)) == pytest.approx(whole.score / 100, rel=1e-12)


@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_empty_answers_are_worth_nothing_and_a_copy_everything(name: str) -> None:
    metric = answer_metric(name)
    text = "the red lamp is on the table in the hall"
    for answer, value in (("", 0), (text, 1)):
        rows = [metric.row(answer, text)] * 3
        assert summarise(rows, metric.score).value == pytest.approx(value)
    assert summarise([metric.row("", "")], metric.score).value == 0


@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_the_test_of_200_rows_takes_moments(name: str) -> None:
    answers, references = real_texts()
    metric = answer_metric(name)
    rows = list(map(metric.row, answers, references))
    start = time.process_time()
    found = compare(rows, rows, metric.score, lower_is_better=False)
    assert time.process_time() - start < 3
    assert (found.low, found.high) == (0, 0)


@pytest.mark.parametrize(
    ("name", "module", "library"),
    [
        ("rougeL", "rouge_score.rouge_scorer", "rouge-score"),
        ("bleu", "sacrebleu.metrics", "sacrebleu"),
        ("chrf", "sacrebleu.metrics", "sacrebleu"),
    ],
)
def test_a_missing_library_is_told(name, module, library, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        UserError, match=rf"{name} needs {library}.*pip install llamaweft\[metrics\]"
    ):
        answer_metric(name)


def test_nothing_is_imported_before_it_is_asked_for() -> None:
    code = (
        "import sys, llamaweft.evaluate.evaluator\n"
        "assert not {'rouge_score', 'nltk', 'sacrebleu'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- the user's own

OWN = """
import numpy as np

def length_ratio(answer, reference):
    return len(answer) / max(len(reference), 1)

def same(answer, reference): return answer == reference
def small(answer, reference): return np.float32(0.25)
def bad(answer, reference): return float("nan")
def endless(answer, reference): return float("inf")
def text(answer, reference): return "0.5"
def nothing(answer, reference): pass
def fails(answer, reference): raise KeyError("x")
def one(answer): return 1
number = 3
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack/own_metrics.py").write_text(OWN)
    (tmp_path / "pack/broken.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("pack", "pack.own_metrics", "pack.broken"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_a_users_metric_is_its_mean_over_rows(own) -> None:
    metric = answer_metric("pack.own_metrics:length_ratio")
    rows = [metric.row("ab", "abcd"), metric.row("abcdef", "abcd"), metric.row("", "abcd")]
    assert summarise(rows, metric.score).value == pytest.approx((0.5 + 1.5 + 0) / 3)
    assert answer_metric("pack.own_metrics:same").row("a", "a") == (1.0, 1.0)
    assert answer_metric("pack.own_metrics:small").row("a", "a") == (0.25, 1.0)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no_such_module:f", "no_such_module cannot be imported .*PYTHONPATH"),
        ("pack.broken:f", "pack.broken cannot be imported .*ZeroDivisionError"),
        ("pack.own_metrics:f", "pack.own_metrics has no f"),
        ("pack.own_metrics:number", "is int, no function"),
        ("pack.own_metrics:one", r"takes \(answer\); it is called with two texts"),
    ],
)
def test_what_is_no_metric_is_refused(own, name: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        answer_metric(name)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("bad", "returned nan"),
        ("endless", "returned inf"),
        ("text", "returned '0.5'"),
        ("nothing", "returned None"),
        ("fails", r"raised KeyError \('x'\)"),
    ],
)
def test_what_is_no_number_is_refused(own, function: str, words: str) -> None:
    with pytest.raises(NoNumberError, match=words):
        answer_metric(f"pack.own_metrics:{function}").row("a", "b")
