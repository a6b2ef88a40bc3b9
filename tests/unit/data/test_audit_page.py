"""The audit's page: nothing is lost on its way into it, nothing breaks out, numbers add up."""

from __future__ import annotations

import base64
import dataclasses
import gzip
import hashlib
import json
import re

import pytest
from html_page import WellFormed
from hypothesis import given, settings
from hypothesis import strategies as st

from llamaweft.data.audit_page import (
    MAX_CHARACTERS,
    PageInput,
    PageRow,
    shared_pieces,
    visible,
    write_audit_page,
)
from llamaweft.errors import UserError

EVIL = "</script></style><img src=x onerror=alert(1)>\"'{{ 7*7 }}{% if %}<!-- <script>"


class Page(WellFormed):
    """(element, text) in order."""

    void = frozenset({"meta", "input", "path", "rect", "br"})

    def __init__(self, text: str) -> None:
        self.texts = []
        super().__init__(text)

    def handle_data(self, data):
        if self.open:
            self.texts.append((self.open[-1], data))

    @property
    def text(self) -> str:
        return " ".join(
            "".join(text for tag, text in self.texts if tag not in ("script", "style")).split()
        )


EMPTY = PageInput("", {}, [], [], 0, [], [], [], [], 2048)


def row(tokens, weights=None, **changes) -> PageRow:
    weights = [1.0] * len(tokens) if weights is None else weights
    return PageRow(
        **({"where": "a.jsonl line 1", "held_out": False, "findings": []} | changes),
        tokens=tokens,
        weights=weights,
    )


def finding(check, status, count=4, **changes):
    what = {
        "check": check,
        "status": status,
        "count": count,
        "share": 0.04,
        "examples": [],
        "remedy": f"mend {check}",
    }
    return what | changes


def written(tmp_path, **changes) -> str:
    write_audit_page(dataclasses.replace(EMPTY, **changes), tmp_path / "report.html")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def unpacked(html: str) -> dict:
    data = re.search(r'id="data">([A-Za-z0-9+/=]*)</script>', html)[1]
    return json.loads(gzip.decompress(base64.b64decode(data)))


def table_rows(html: str) -> list[str]:
    return [
        Page(part.replace("<t", " <t").replace("<li>", "<li> ")).text
        for part in re.findall(r"<tr>.*?</tr>", html, re.DOTALL)
    ]


TOKENS = st.lists(
    st.tuples(st.text(alphabet=st.characters(), max_size=5), st.sampled_from([0.0, 0.5, 1.0, 2.0]))
)


@settings(max_examples=30, deadline=None)  # each one writes a page
@given(content=TOKENS)
def test_every_token_and_weight_comes_out_as_it_went_in(tmp_path_factory, content):
    tokens, weights = [t for t, _ in content], [w for _, w in content]
    html = written(tmp_path_factory.mktemp("page"), rows=[row(tokens, weights)], rows_in_all=1)
    held = unpacked(html)["rows"][0]
    text, cut, begin = held["text"].encode("utf-16-le"), [], 0
    for length in held["lengths"]:  # as JavaScript counts
        cut.append(text[2 * begin : 2 * (begin + length)].decode("utf-16-le"))
        begin += length
    assert cut == [visible(token) for token in tokens]
    assert [w for count, w in held["runs"] for _ in range(count)] == weights
    assert all(a[1] != b[1] for a, b in zip(held["runs"], held["runs"][1:], strict=False))


def test_tokens_and_weights_of_different_number_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a.jsonl line 1: 2 tokens, 1 weights"):
        written(tmp_path, rows=[row(["a", "b"], [1.0])])


def test_what_cannot_be_seen_is_written_out():
    assert (
        visible("a\x00\x1b[0m\u202e\u200b\ud83d\r") == r"a\u0000\u001b[0m\u202e\u200b\ud83d\u000d"
    )
    assert visible("tab\tline\nä 中 مرحبا 👩\u200d🚀") == "tab\tline\nä 中 مرحبا 👩\u200d🚀"


def test_data_never_breaks_out_of_the_page(tmp_path):
    html = written(
        tmp_path,
        title=EVIL,
        audit={
            "findings": [
                finding(EVIL, "blocking", examples=[EVIL, "other"], remedy=EVIL),
                finding("x", EVIL),
            ]
        },
        cleaning=[{"step": EVIL, "count": 1, "changed": 2, "examples": [EVIL]}],
        rows=[row([EVIL, EVIL], [0.0, 1.0], where=EVIL, findings=[EVIL])],
        pairs=[dict.fromkeys(("kind", "left", "right", "left_text", "right_text", "shared"), EVIL)],
    )
    page = Page(html)
    assert "img" not in page.elements
    assert page.elements.count("script") == 2
    assert not [
        name for name, _ in page.attributes if name.startswith("on") or name in ("src", "srcset")
    ]
    for tag in ("h1", "title", "strong", "li", "td", "h3", "span"):
        assert any(EVIL in text for inside, text in page.texts if inside == tag), tag
    assert ("data-find", EVIL) in page.attributes


def test_the_page_loads_nothing_and_runs_its_own_script_only(tmp_path):
    html = written(tmp_path, rows=[row(["a"])])
    assert not re.search(r"https?:|//[a-z]|url\(|@import", html.split("</style>")[0])
    script = html.split("<script>")[1].split("</script>")[0]
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    allowed = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert policy == f"{allowed}; base-uri 'none'; form-action 'none'"


def test_equal_pages_are_equal_files(tmp_path):
    assert written(tmp_path, rows=[row(["a"])]) == written(tmp_path, rows=[row(["a"])])
    assert written(tmp_path, rows=[row(["a"])]) != written(tmp_path, rows=[row(["b"])])


def test_a_page_that_cannot_be_written_is_a_sentence(tmp_path):
    with pytest.raises(
        UserError, match=r"no/report.html cannot be written: No such file.*; give --html"
    ):
        write_audit_page(EMPTY, tmp_path / "no" / "report.html")


def test_names_with_half_characters_are_written(tmp_path):
    html = written(tmp_path, rows=[row(["a"], where="caf\udce9.jsonl line 1")], title="caf\udce9")
    assert r"<h1>caf\udce9</h1>" in html
    assert unpacked(html)["rows"][0]["where"] == r"caf\udce9.jsonl line 1"


@pytest.mark.parametrize(
    ("findings", "passed", "verdict"),
    [
        ([finding("a", "passed", 0)], True, "✓ Passed Nothing blocks training."),
        (
            [finding("dup", "warning")],
            True,
            "! Passed with warnings Nothing blocks training; worth a look: dup.",
        ),
        (
            [
                finding("leak", "blocking", 1200),
                finding("dup", "warning"),
                finding("empty", "blocking", 1),
            ],
            False,
            "✕ Blocked Training does not start until this is mended: leak (1,200 rows): mend leak empty (1 row): mend empty",
        ),
    ],
)
def test_the_verdict_says_in_words_what_blocks(tmp_path, findings, passed, verdict):
    html = written(
        tmp_path,
        audit={
            "findings": findings,
            "passed": passed,
            "rows": 5000,
            "tokens": 200,
            "trained_tokens": 50,
        },
    )
    headline = Page(re.search(r'<div class="headline.*?</div>', html, re.DOTALL)[0]).text
    assert headline == f"{verdict} 5,000 training rows, 200 tokens, 50 of them trained (25.0%)."


def test_checks_are_a_table_and_the_worst_comes_first(tmp_path):
    findings = [
        finding("fine", "passed", 0, share=0.0),
        finding("dup", "warning", examples=["a.jsonl line 1", "b line 9"]),
        finding("leak", "blocking", 1234, share=0.5),
    ]
    html = written(tmp_path, audit={"findings": findings}, rows=[row(["a"], findings=["dup"])])
    assert table_rows(html)[1:4] == [
        "✕ blocking leak 1,234 50.0% mend leak",
        "! warning dup 4 4.0% a.jsonl line 1 b line 9 mend dup",
        "✓ passed fine 0 0.0%",
    ]
    links = [pair for pair in Page(html).attributes if pair[0] in ("data-find", "data-check")]
    assert links == [("data-check", "dup"), ("data-find", "a.jsonl line 1")]


def test_cleaning_is_counted(tmp_path):
    step = {"step": "near_duplicates", "count": 1312, "changed": 7, "examples": ["a line 3: hello"]}
    assert "near_duplicates 1,312 7 a line 3: hello" in table_rows(
        written(tmp_path, cleaning=[step])
    )


def bars(html: str) -> list[tuple[str, int, float]]:
    found = re.findall(r'height="([\d.]+)"><title>(.*?): ([\d,]+) rows?</title>', html)
    return [(label, int(count.replace(",", "")), float(height)) for height, label, count in found]


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 100_000), min_size=1, max_size=60),
    limit=st.integers(1, 200_000),
)
def test_the_length_histogram_holds_every_row(tmp_path_factory, lengths, limit):
    html = written(tmp_path_factory.mktemp("page"), lengths=lengths, max_length_tokens=limit)
    drawn = bars(html)
    assert sum(count for _, count, _ in drawn) == len(lengths)
    assert max(height for _, _, height in drawn) == 100
    bins = int(re.search(r'viewBox="0 0 (\d+) 100"', html)[1])
    assert bins <= 41
    for label, count, _ in drawn:
        low, high = (
            int(part.replace(",", "")) if part else 10**9
            for part in re.fullmatch(r"([\d,]+)(?: (?:to ([\d,]+)|and more))?", label).groups()
        )
        if high == 10**9 and "more" not in label:
            high = low
        assert count == sum(low <= length <= high for length in lengths)
    over = sum(length > limit for length in lengths)
    assert f"{over} {'row is' if over == 1 else 'rows are'} longer than max_length_tokens" in html


def test_the_limit_stands_where_it_belongs(tmp_path):
    html = written(tmp_path, lengths=[0, 50, 99], max_length_tokens=75)
    bins = int(re.search(r'viewBox="0 0 (\d+) 100"', html)[1])
    at = float(re.search(r'class="limit" d="M([\d.]+) 0V100"', html)[1])
    width = 5  # of a bar, in tokens
    assert bins * width == 100
    assert at * width == 75
    far = written(tmp_path, lengths=[10, 20, 30], max_length_tokens=8192)
    assert "longer than max_length_tokens, 8,192, which stands far to the right" in far
    assert "0V100" not in far


def test_a_few_very_long_rows_do_not_flatten_the_others(tmp_path):
    drawn = bars(
        written(tmp_path, lengths=[*range(100, 300)] * 5 + [1_000_000], max_length_tokens=512)
    )
    assert [count for _, count, _ in drawn[:-1]] == [250, 250, 250, 250]
    assert drawn[-1][0].endswith("and more")
    assert drawn[-1][1] == 1


def test_trained_shares_from_none_to_all(tmp_path):
    html = written(tmp_path, trained_shares=[0.0, 0.0, 0.5, 1.0])
    assert bars(html) == [("0% to 5%", 2, 100.0), ("50% to 55%", 1, 50.0), ("95% to 100%", 1, 50.0)]


def marked(text: str, other: str, shared: str) -> list[str]:
    return [piece for piece, both in shared_pieces(text, other, shared) if both]


def test_the_shared_text_is_marked_whatever_its_case_and_punctuation():
    assert marked("well, Turn on the lamp!", "", "Turn on the lamp") == ["Turn on the lamp"]
    assert marked("well, Turn ON,\nthe_lamp!", "", "turn on the lamp") == ["Turn ON,\nthe_lamp"]
    assert marked("a (b+", "", "(b+") == ["(b+"]


def test_without_a_shared_text_the_words_of_both_are_marked():
    assert marked("turn on the lamp now", "please Turn on the light now", "") == [
        "turn on the ",
        "now",
    ]
    assert marked("apples", "pears", "") == []


def test_a_long_text_is_shown_around_what_is_shared():
    text = "x" * 9000 + " needle " + "y" * 9000
    pieces = shared_pieces(text, "", "needle")
    assert [piece for piece, both in pieces if both] == ["needle"]
    assert pieces[0] == ("(8,801 characters before) … ", False)
    assert pieces[-1] == (f" … ({len(text) - 8801 - MAX_CHARACTERS:,} characters after)", False)
    assert sum(len(piece) for piece, _ in pieces[1:-1]) == MAX_CHARACTERS


@given(text=st.text(max_size=60), other=st.text(max_size=60), shared=st.text(max_size=10))
def test_pieces_are_the_text(text, other, shared):
    assert "".join(piece for piece, _ in shared_pieces(text, other, shared)) == text
    assert marked(text, text, "") == ([text] if text else [])


def test_an_old_browser_has_the_first_rows_in_the_page(tmp_path):
    rows = [
        row([f"question {n}", f" answer {n}"], [0.0, 1.0], where=f"a line {n}") for n in range(30)
    ]
    page = Page(written(tmp_path, rows=rows, rows_in_all=900))
    assert "This page holds 30 rows of 900." in page.text
    assert "question 9" in page.text
    assert "question 10" not in page.text


def luminance(colour: str) -> float:
    digits = colour.lstrip("#")
    digits = "".join(2 * d for d in digits) if len(digits) == 3 else digits
    parts = (int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4))
    linear = [
        part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first: str, second: str) -> float:
    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colours_have_contrast(tmp_path, scheme):
    """WCAG 2.2 AA: 4.5 for text, 3 for lines that carry a meaning."""
    blocks = re.findall(r":root \{(.*?)\}", written(tmp_path), re.DOTALL)
    colours = dict(re.findall(r"--([\w-]+): (#\w+)", blocks[scheme]))
    for ink in ("ink", "quiet", "accent", "good", "bad", "care", "limit"):
        assert contrast(colours[ink], colours["ground"]) >= 4.5, ink
    for ink in ("ink", "quiet", "bad", "care", "good"):
        assert contrast(colours[ink], colours["sheet"]) >= 4.5, ink
    for under in ("trained", "mark"):
        assert contrast(colours["ink"], colours[under]) >= 4.5, under
    for line, under in (
        ("edge", "ground"),
        ("accent", "trained"),
        ("limit", "ground"),
        ("care", "sheet"),
    ):
        assert contrast(colours[line], colours[under]) >= 3, line
