"""What the page of `data audit --html` shows: rows, packs, and rows that are alike."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from llamaweft.data.audit_page import PageInput, PageRow
from llamaweft.data.chat import Tokenizer
from llamaweft.data.cleaning import texts_of
from llamaweft.data.packing import Bin
from llamaweft.data.prepare import Prepared
from llamaweft.data.store import StoredRows

MOST_ROWS = 5000
FOUND_ROWS = 200
"""Rows of each finding that are on the page wherever they stand in the data."""

PACKS_SHOWN = 8
PAIRS_SHOWN = 50
LENGTHS_SHOWN = 200_000
"""Rows that the histograms are made of, spread over the data."""


def page_input(
    title: str, prepared: Prepared, packs: Sequence[Bin], tokenizer: Tokenizer, longest: int
) -> PageInput:
    """packs: the first of an epoch, whose documents are on the page. longest:
    data.max_length_tokens."""
    stored, held = prepared.examples.stored, prepared.validation.stored
    shown_packs = [prepared.documents.rows_N[p.documents].tolist() for p in packs[:PACKS_SHOWN]]
    first = {row: None for pack in shown_packs for row in pack}
    for found_N in prepared.by_check.values():
        first |= dict.fromkeys(found_N[:FOUND_ROWS].tolist())
    first |= dict.fromkeys(prepared.examples.rows_N[:MOST_ROWS].tolist())
    training = sorted(list(first)[:MOST_ROWS])
    findings: defaultdict[int, list[str]] = defaultdict(list)
    for check, found_N in prepared.by_check.items():
        for row in np.intersect1d(found_N, training).tolist():
            findings[row].append(check)
    texts = TokenTexts(tokenizer)
    rows = [_row(stored, row, False, findings[row], texts) for row in training]
    rows += [
        _row(held, row, True, [], texts)
        for row in prepared.validation.rows_N[: MOST_ROWS // 10].tolist()
    ]
    place = {row: i for i, row in enumerate(training)}
    every = prepared.examples.rows_N
    sample = stored.table[every[:: max(1, len(every) // LENGTHS_SHOWN)]]
    return PageInput(
        title=title,
        audit=prepared.audit.to_dict(),
        cleaning=prepared.audit.cleaning,
        rows=rows,
        rows_in_all=len(prepared.examples) + len(prepared.validation),
        packs=[[place[row] for row in pack if row in place] for pack in shown_packs],
        pairs=list(_pairs(prepared)),
        lengths=sample["tokens"].tolist(),
        trained_shares=(sample["trained"] / np.maximum(1, sample["tokens"])).tolist(),
        max_length_tokens=longest,
    )


class TokenTexts:
    """Tokens as text, each decoded once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._decode = tokenizer.decode
        self._known: dict[int, str] = {}

    def __call__(self, ids: Iterable[int]) -> list[str]:
        for token in ids:
            if token not in self._known:
                self._known[token] = self._decode([token])
        return [self._known[token] for token in ids]


def _row(
    stored: StoredRows, row: int, held_out: bool, findings: list[str], texts: TokenTexts
) -> PageRow:
    document = stored.document(row)
    tokens, weights = texts(document.ids.tolist()), document.weights.tolist()
    return PageRow(document.where, held_out, tokens, weights, findings)


def _pairs(prepared: Prepared) -> Iterable[dict[str, Any]]:
    """Rows that are alike, side by side."""
    stored, held = prepared.examples.stored, prepared.validation.stored
    first: dict[int, int] = {}
    keys = stored.table["key"]
    twins = prepared.by_check["duplicate"][:PAIRS_SHOWN].tolist()
    wanted = {int(keys[row]) for row in twins}
    for row in prepared.examples.rows_N[np.isin(keys[prepared.examples.rows_N], list(wanted))]:
        first.setdefault(int(keys[row]), int(row))
    for row in twins:
        yield _pair("duplicate", stored, first[int(keys[row])], stored, row, "")
    for later, earlier in stored.state.get("near_duplicates", [])[:PAIRS_SHOWN]:
        yield _pair("near duplicate", stored, earlier, stored, later, "")
    for pair in prepared.found.pairs[:PAIRS_SHOWN]:
        yield _pair("leak", stored, pair.row, held, pair.reference_row, pair.shared)


def _pair(
    kind: str, left: StoredRows, left_row: int, right: StoredRows, right_row: int, shared: str
) -> dict[str, Any]:
    examples = left.example(left_row), right.example(right_row)
    texts = ["\n".join(texts_of(example)) for example in examples]
    return {
        "kind": kind,
        "left": examples[0].where,
        "right": examples[1].where,
        "left_text": texts[0],
        "right_text": texts[1],
        "shared": shared,
    }
