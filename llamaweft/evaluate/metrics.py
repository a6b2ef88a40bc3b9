"""Measures of answers against references, one number a row, and what they come to.

Every metric is a mean or a ratio over rows, so its interval comes from resampling rows.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Parts = tuple[float, float]
"""Numerator and denominator that a row adds to a metric."""

RESAMPLES = 2000


@dataclass(frozen=True)
class Value:
    """A metric on held-out rows. low, high: 95% percentile bootstrap over rows. count: rows."""

    value: float
    low: float
    high: float
    count: int


def summarise(parts: list[Parts], transform: Callable[[Any], Any] = lambda ratio: ratio) -> Value:
    """sum(numerators) / sum(denominators) with its bootstrap interval (Efron, 1979).

    `transform` is applied to the ratio: exp for perplexity. The resampling seed is fixed.
    """
    rows = np.asarray(parts, dtype=np.float64)
    counts = np.random.default_rng(0).multinomial(
        len(rows), np.full(len(rows), 1 / len(rows)), size=RESAMPLES
    )
    sums = counts @ rows
    ratios = sums[:, 0] / np.maximum(sums[:, 1], 1e-12)
    low, high = np.percentile(transform(ratios), [2.5, 97.5])
    value = transform(rows[:, 0].sum() / max(rows[:, 1].sum(), 1e-12))
    return Value(float(value), float(low), float(high), len(rows))


def exact_match(answer: str, reference: str) -> Parts:
    """1 where both are the same text, or, where the reference is a JSON object or list, the same
    JSON value whatever the order of its keys."""
    expected = parse_json(reference)
    if expected is None:
        return float(answer.strip() == reference.strip()), 1.0
    return float(_typed(parse_json(answer)) == _typed(expected)), 1.0


def json_valid(answer: str, reference: str) -> Parts:
    """1 where the answer is a JSON object or list."""
    return float(parse_json(answer) is not None), 1.0


def f1(answer: str, reference: str) -> Parts:
    """Overlap of words, by SQuAD's definition: lower case, without punctuation and articles
    (Rajpurkar et al., 2016)."""
    got, expected = Counter(_squad_words(answer)), Counter(_squad_words(reference))
    if not got or not expected:
        return float(got == expected), 1.0
    same = (got & expected).total()
    return 2 * same / (got.total() + expected.total()), 1.0


def field_f1(answer: str, reference: str) -> Parts:
    """F1 of the leaves of the JSON value: a leaf is right where path and value are. Counted over
    all rows together (micro)."""
    got, expected = Counter(_leaves(parse_json(answer))), Counter(_leaves(parse_json(reference)))
    return 2.0 * (got & expected).total(), float(got.total() + expected.total())


ANSWER_METRICS: dict[str, Callable[[str, str], Parts]] = {
    "exact_match": exact_match,
    "f1": f1,
    "json_valid": json_valid,
    "field_f1": field_f1,
}
"""Metrics that compare a generated answer with its reference."""


def parse_json(text: str) -> Any:
    """The object or list that the text is, or None."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict | list) else None


def _typed(value: Any) -> Any:
    """A value in which True and 1 are not equal, as they are not in JSON."""
    match value:
        case dict():
            return {key: _typed(inner) for key, inner in value.items()}
        case list():
            return [_typed(inner) for inner in value]
        case bool():
            return ("bool", value)
        case _:
            return value


def _leaves(value: Any, path: str = "") -> list[tuple[str, str]]:
    match value:
        case None if not path:
            return []
        case dict():
            return [leaf for k, v in value.items() for leaf in _leaves(v, f"{path}.{k}")]
        case list():
            return [leaf for v in value for leaf in _leaves(v, f"{path}[]")]
        case _:
            return [(path, json.dumps(value))]


def _squad_words(text: str) -> list[str]:
    plain = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()
