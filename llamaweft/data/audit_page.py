"""The page of `data audit --html`: what the audit found, and every row token by token.

One file that needs no network. The rows are in it as gzip and base64, and its script puts only
those of one page into the document. What comes from the data may be anything: it is shown as text.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined

from llamaweft.data.audit import audit_in_words, finding_in_words
from llamaweft.errors import UserError
from llamaweft.files import write_text

MAX_CHARACTERS = 4000
"""Of a text in a pair; the rest is counted, not shown."""
PLAIN_ROWS = 10
TOKENS_SHOWN = 800
"""Of a row, until its button is pressed."""
MAX_BINS = 40

_UNSEEN = re.compile(  # what no eye sees, what turns text around, and halves of characters
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff"
    "\ud800-\udfff]"
)
_STATUS_ORDER = {"blocking": 0, "warning": 1, "passed": 3}  # any other one: 2
_TEMPLATE = Path(__file__).with_suffix(".html")

Runs = list[tuple[int, float]]
Pieces = list[tuple[str, bool]]


@dataclass(frozen=True)
class PageRow:
    """One document. tokens: decoded piece by piece, control tokens as they are written.
    weights: one for each token; 0 is context, more is trained. findings: checks that found it."""

    where: str
    held_out: bool
    tokens: list[str]
    weights: list[float]
    findings: list[str]


@dataclass(frozen=True)
class PageInput:
    """What a page is made of. Any list may be empty.

    audit: Audit.to_dict(). cleaning: {"step", "count", "changed", "examples"} of each step.
    rows: those that the page holds, of `rows_in_all`. packs: for each pack the indices into `rows`
    of its documents, in order. pairs: {"kind", "left", "right", "left_text", "right_text",
    "shared"}; an empty `shared` marks the words that both have. lengths, trained_shares: of every
    row, held in the page or not.
    """

    title: str
    audit: dict[str, Any]
    cleaning: list[dict[str, Any]]
    rows: list[PageRow]
    rows_in_all: int
    packs: list[list[int]]
    pairs: list[dict[str, Any]]
    lengths: list[int]
    trained_shares: list[float]
    max_length_tokens: int


@dataclass(frozen=True)
class Bar:
    """The rows between two edges of a histogram. percent: its height, of the highest."""

    label: str
    count: int
    percent: float


@dataclass(frozen=True)
class Histogram:
    """One picture with what its caption says. ticks: (percent from the left, label).
    limit: where max_length_tokens stands, in percent; None where it is not drawn."""

    title: str
    unit: str
    note: str
    bars: list[Bar]
    ticks: list[tuple[float, str]]
    limit: float | None


def write_audit_page(page: PageInput, path: Path) -> None:
    """Write the page, complete or not at all. Raises UserError where it cannot be written."""
    html = _html(page)
    try:
        write_text(path, html)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror or error}; give --html another path"
        ) from None


def _html(page: PageInput) -> str:
    source = _TEMPLATE.read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    shown = {row.where for row in page.rows}
    found = Counter(name for row in page.rows for name in dict.fromkeys(row.findings))
    view = {
        "title": page.title or "Audit of the data",
        "verdict": _verdict(page.audit),
        "summary": audit_in_words(page.audit),
        "findings": [_finding(f, found, shown) for f in _ordered(page.audit)],
        "cleaning": page.cleaning,
        "histograms": [
            h for h in (_lengths(page.lengths, page.max_length_tokens), _shares(page)) if h
        ],
        "max_length_tokens": page.max_length_tokens,
        "rows_held": len(page.rows),
        "rows_in_all": page.rows_in_all,
        "packs": len(page.packs),
        "pairs": len(page.pairs),
        "found": found,
        "plain": [_plain(row) for row in page.rows[:PLAIN_ROWS]],
        "tokens_shown": TOKENS_SHOWN,
        "data": _packed(page),
        "script_hash": _script_hash(source),
    }
    return visible(environment.from_string(source).render(view))


def visible(text: str) -> str:
    r"""`text` with what cannot be seen written out: an escape character becomes \u001b."""
    return _UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


_visible_token = lru_cache(maxsize=2**18)(visible)


def _script_hash(source: str) -> str:
    """The page's own script is the only one that its Content-Security-Policy lets run."""
    script = source.split("<script>")[1].split("</script>")[0]
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _packed(page: PageInput) -> str:
    """What the script shows, as JSON in gzip in base64; equal pages give equal text."""
    content = {
        "rows": [_row(row) for row in page.rows],
        "packs": page.packs,
        "pairs": [_pair(pair) for pair in page.pairs],
        "tokens_shown": TOKENS_SHOWN,
    }
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode(), 6, mtime=0)).decode()


def _row(row: PageRow) -> dict[str, Any]:
    """A text is searched as it is; lengths, in the units of JavaScript, cut it into tokens."""
    tokens = [_visible_token(token) for token in row.tokens]
    return {
        "where": visible(row.where),
        "held_out": row.held_out,
        "text": "".join(tokens),
        "lengths": [_utf16_length(token) for token in tokens],
        "runs": _runs(row),
        "findings": row.findings,
    }


@lru_cache(maxsize=2**18)
def _utf16_length(text: str) -> int:
    return len(text.encode("utf-16-le")) // 2


def _runs(row: PageRow) -> Runs:
    """(tokens, weight) of neighbours with equal weight."""
    if len(row.tokens) != len(row.weights):
        raise ValueError(f"{row.where}: {len(row.tokens)} tokens, {len(row.weights)} weights")
    return [(len(list(run)), float(weight)) for weight, run in groupby(row.weights)]


def _plain(row: PageRow) -> dict[str, Any]:
    """The beginning of a row in runs of equal weight, for where the script cannot run."""
    pieces, begin = [], 0
    for count, weight in _runs(row):
        end = min(begin + count, TOKENS_SHOWN)
        pieces.append(("".join(row.tokens[begin:end]), weight))
        begin = end
    return {
        "where": row.where,
        "held_out": row.held_out,
        "findings": row.findings,
        "pieces": [piece for piece in pieces if piece[0]],
        "tokens": len(row.tokens),
    }


def _pair(pair: dict[str, Any]) -> dict[str, Any]:
    left, right, shared = (visible(str(pair[k])) for k in ("left_text", "right_text", "shared"))
    return {
        "kind": visible(str(pair["kind"])),
        "left": visible(str(pair["left"])),
        "right": visible(str(pair["right"])),
        "left_pieces": shared_pieces(left, right, shared),
        "right_pieces": shared_pieces(right, left, shared),
    }


def shared_pieces(text: str, other: str, shared: str) -> Pieces:
    """`text` in pieces, each with whether it is shared with `other`, clipped around that.

    `shared` may differ from `text` in case, punctuation and white space. Where it does not stand
    there, the words that both texts have in the same order are shared.
    """
    span = _span(text, shared)
    if span is None:
        return [*_common(text[:MAX_CHARACTERS], other[:MAX_CHARACTERS]), *_rest(text, 0)]
    start, end = span
    first = max(0, start - 200) if end > MAX_CHARACTERS else 0
    last = first + MAX_CHARACTERS
    pieces = [(text[first:start], False), (text[start:end][: last - start], True)]
    pieces += [(text[end:last], False), *_rest(text, first)]
    before = [(f"({first:,} characters before) … ", False)] if first else []
    return [piece for piece in before + pieces if piece[0]]


def _span(text: str, shared: str) -> tuple[int, int] | None:
    """Where `shared` stands in `text`."""
    if shared and (start := text.find(shared)) >= 0:
        return start, start + len(shared)
    words = re.findall(r"[^\W_]+", shared[:MAX_CHARACTERS])
    found = re.search(r"[\W_]+".join(words), text, re.IGNORECASE) if words else None
    return found.span() if found else None


def _common(text: str, other: str) -> Pieces:
    """`text` in pieces, each with whether its words stand in `other` in the same order."""
    parts, others = (re.findall(r"\w+\W*|\W+", t) for t in (text, other))
    same = [False] * len(parts)
    words, other_words = ([part.strip().casefold() for part in side] for side in (parts, others))
    for block in SequenceMatcher(None, words, other_words).get_matching_blocks():
        same[block.a : block.a + block.size] = [True] * block.size
    runs = groupby(zip(parts, same, strict=True), key=lambda pair: pair[1])
    return [("".join(part for part, _ in run), flag) for flag, run in runs]


def _rest(text: str, first: int) -> Pieces:
    more = len(text) - first - MAX_CHARACTERS
    return [(f" … ({more:,} characters after)", False)] if more > 0 else []


def _ordered(audit: dict[str, Any]) -> list[dict[str, Any]]:
    return sorted(audit.get("findings", []), key=lambda f: _STATUS_ORDER.get(f["status"], 2))


def _finding(finding: dict[str, Any], found: Counter[str], shown: set[str]) -> dict[str, Any]:
    """One line of the table. found, shown: checks and places that a link can lead to."""
    return finding_in_words(finding) | {
        "examples": [(str(where), where in shown) for where in finding["examples"]],
        "linked": finding["check"] in found,
    }


def _verdict(audit: dict[str, Any]) -> dict[str, Any]:
    """What the audit says in words and in what tone, and the findings that block."""
    blocking, warnings = (
        [f for f in audit.get("findings", []) if f["status"] == status]
        for status in ("blocking", "warning")
    )
    if not audit.get("passed", not blocking):
        text = "Training does not start until this is mended:"
        return {"tone": "bad", "word": "✕ Blocked", "text": text, "blocking": blocking}
    if warnings:
        names = ", ".join(str(finding["check"]) for finding in warnings)
        tone, word = "care", "! Passed with warnings"
        text = f"Nothing blocks training; worth a look: {names}."
    else:
        tone, word, text = "good", "✓ Passed", "Nothing blocks training."
    return {"tone": tone, "word": word, "text": text, "blocking": []}


def _lengths(lengths: Sequence[int], limit: int) -> Histogram | None:
    """Up to the longest row and the limit; a few rows far beyond all others share the last bar,
    and a limit far beyond them is not drawn."""
    if not lengths:
        return None
    values = np.asarray(lengths)
    longest, far = int(values.max()), int(4 * np.quantile(values, 0.99)) + 1
    end = max(min(longest, far), limit if limit <= far else 0)
    width = _round_number(end / MAX_BINS)
    bins = end // width + 1
    edges = width * np.arange(bins + 1)
    counts, _ = np.histogram(np.minimum(values, edges[-1] - 1), edges)
    labels = [f"{low:,} to {low + width - 1:,}" if width > 1 else f"{low:,}" for low in edges[:-1]]
    if longest >= edges[-1]:
        labels[-1] = f"{edges[-2]:,} and more"
    over = int((values > limit).sum())
    step = _round_number(int(edges[-1]) / 5)
    return Histogram(
        title="Rows by length in tokens",
        unit="tokens",
        note=f"median {np.median(values):,.0f}, longest {longest:,}; {over:,} "
        f"{'row is' if over == 1 else 'rows are'} longer than max_length_tokens"
        + ("" if limit <= end else f", {limit:,}, which stands far to the right"),
        bars=_bars(labels, counts.tolist()),
        ticks=[(100 * at / int(edges[-1]), f"{at:,}") for at in range(0, int(edges[-1]), step)],
        limit=100 * limit / int(edges[-1]) if limit <= end else None,
    )


def _shares(page: PageInput) -> Histogram | None:
    if not page.trained_shares:
        return None
    counts, _ = np.histogram(page.trained_shares, bins=20, range=(0.0, 1.0))
    return Histogram(
        title="Rows by trained share",
        unit="share",
        note=f"median {np.median(page.trained_shares):.0%}",
        bars=_bars([f"{low}% to {low + 5}%" for low in range(0, 100, 5)], counts.tolist()),
        ticks=[(at, f"{at}%") for at in (0, 25, 50, 75, 100)],
        limit=None,
    )


def _bars(labels: list[str], counts: list[int]) -> list[Bar]:
    top = max(counts)
    return [Bar(label, n, 100 * n / top) for label, n in zip(labels, counts, strict=True)]


def _round_number(least: float) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50, ... that is not below `least`."""
    size = 1
    while size * 5 < least:
        size *= 10
    return next(size * factor for factor in (1, 2, 5) if size * factor >= least)
