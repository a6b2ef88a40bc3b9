"""Metrics by name: what each row adds to one, and how the value comes from the sum over rows.

D: draws of rows. S: statistics of a row.
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

from llamaweft.errors import UserError
from llamaweft.evaluate.bootstrap import Parts, Score, ratio
from llamaweft.evaluate.head_metrics import HEAD_SCORES
from llamaweft.evaluate.imported_metrics import corpus_score, rouge, user_metric


@dataclass(frozen=True)
class Metric:
    """row: (answer, reference) -> what the row adds. score: of summed rows, sums_DS -> value_D."""

    row: Callable[[str, str], Parts]
    score: Score = ratio


def perplexity(sums_DS: np.ndarray) -> np.ndarray:
    """exp of the mean loss in nats."""
    return np.exp(ratio(sums_DS))


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


def squad_exact_match(answer: str, reference: str) -> Parts:
    """1 where both say the same words, by SQuAD's definition (Rajpurkar et al., 2016)."""
    return float(_squad_words(answer) == _squad_words(reference)), 1.0


def field_f1(answer: str, reference: str) -> Parts:
    """F1 of the leaves of the JSON value: a leaf is right where path and value are. Counted over
    all rows together (micro)."""
    got, expected = Counter(_leaves(parse_json(answer))), Counter(_leaves(parse_json(reference)))
    return 2.0 * (got & expected).total(), float(got.total() + expected.total())


LOSSES: dict[str, Score] = {"loss": ratio, "perplexity": perplexity}
"""Metrics of the summed loss and the trained weight of each document; lower is better."""

_OURS = {"exact_match": exact_match, "f1": f1, "json_valid": json_valid, "field_f1": field_f1}


def answer_metric(name: str) -> Metric:
    """A metric that compares generated answers with references; `package.module:function` is a
    user's own. Higher is better. Raises UserError where its library or module is missing, and for
    a metric of something else."""
    if ":" in name:
        return Metric(user_metric(name))
    if name in ("bleu", "chrf"):
        return Metric(*corpus_score(name))
    if name in ("rouge1", "rouge2", "rougeL"):
        return Metric(rouge(name))
    if name not in _OURS:
        raise UserError(
            f"evaluation.metrics: {name} does not compare generated answers; leave it out here"
        )
    return Metric(_OURS[name])


def score_of(name: str) -> Score:
    """How a metric's value comes from the sum over rows. Raises UserError as `answer_metric`."""
    known = LOSSES | HEAD_SCORES
    return known[name] if name in known else answer_metric(name).score


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
