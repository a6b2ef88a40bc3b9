"""Held-out metrics before and after training, as text, with the verdict of the paired test."""

from __future__ import annotations

import math
from typing import Any

from llamaweft.evaluate.bootstrap import BETTER, NOT_SHOWN, WORSE
from llamaweft.evaluate.curves import interval_svg, is_share

NOTHING = "—"
NOT_COMPARED = "not compared"
"""The verdict where one side was not measured."""
NOT_TESTED = "not tested"
"""The verdict where both were, and the evaluation holds no paired test of them."""


def compare_metrics(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """Every metric of an evaluation as a report shows it.

    Each: name, before and after with their intervals, before_value and after_value without,
    difference with its interval, verdict, rows, and a picture where the metric is a share.
    """
    before = (evaluation.get("before") or {}).get("metrics", {})
    after = (evaluation.get("after") or {}).get("metrics", {})
    tests = evaluation.get("difference") or {}
    return [
        _metric(name, before.get(name), after.get(name), tests.get(name))
        for name in {**before, **after}
    ]


def _metric(
    name: str,
    before: dict[str, Any] | None,
    after: dict[str, Any] | None,
    test: dict[str, Any] | None,
) -> dict[str, Any]:
    both = [measured for measured in (before, after) if measured]
    parts = [n for measured in both if (n := finite(measured.get("value"))) is not None]
    share = is_share(name, parts)
    return {
        "name": name,
        "before": _shown(before, share),
        "after": _shown(after, share),
        "before_value": _shown(before, share, interval=False),
        "after_value": _shown(after, share, interval=False),
        "difference": _shown(test, share, difference=True),
        "verdict": _verdict(test) if before and after else NOT_COMPARED,
        "rows": next((f"{m['count']:,}" for m in reversed(both) if m.get("count")), NOTHING),
        "picture": interval_svg(_triple(before), _triple(after)) if share and parts else None,
    }


def _verdict(test: dict[str, Any] | None) -> str:
    verdict = (test or {}).get("verdict")
    return verdict if verdict in (BETTER, WORSE, NOT_SHOWN) else NOT_TESTED


def headline(evaluations: list[dict[str, Any]]) -> dict[str, str]:
    """The first metric of the first evaluation in one line."""
    first = next((e for e in evaluations if e["metrics"]), None)
    if first is None:
        return {"text": "Nothing was measured on held-out rows.", "verdict": NOT_COMPARED}
    metric = first["metrics"][0]
    rows = "" if metric["rows"] == NOTHING else f" ({metric['rows']} held-out rows)"
    if metric["after"] == NOTHING:
        change = f"{metric['before']} before training, not measured after it"
    elif metric["before"] == NOTHING:
        change = f"{metric['after']} after training, not measured before it"
    else:
        change = f"{metric['before']} → {metric['after']}"
    text = f"{metric['name']} on {first['name']}: {change}{rows}"
    return {
        "text": f"{text}: {metric['verdict']}.",
        "what": f"{metric['name']} on {first['name']}",
        "before": metric["before_value"],
        "after": metric["after_value"],
        "verdict": metric["verdict"],
    }


def finite(number: Any) -> float | None:
    """The number, or None for what is no finite number."""
    return float(number) if isinstance(number, int | float) and math.isfinite(number) else None


def _has_interval(measured: dict[str, Any]) -> bool:
    return None not in (finite(measured.get("low")), finite(measured.get("high")))


def _triple(measured: dict[str, Any] | None) -> tuple[float, float, float] | None:
    """(value, low, high); the value alone thrice where there is no interval."""
    value = finite((measured or {}).get("value"))
    if measured is None or value is None:
        return None
    if not _has_interval(measured):
        return value, value, value
    return value, float(measured["low"]), float(measured["high"])


def _shown(
    measured: dict[str, Any] | None, share: bool, interval: bool = True, difference: bool = False
) -> str:
    """The value with its interval. A difference has its sign; of shares it is in percentage
    points, "pp"."""
    triple = _triple(measured)
    if measured is None or triple is None:
        return NOTHING
    value, low, high = triple
    # 3 decimals, and for a small number as many as show 3 of its digits
    size = math.floor(math.log10(abs(value))) if value else 0
    digits = min(max(3, 2 - size), 9)

    def one(number: float) -> str:
        if difference:
            return f"{100 * number:+.1f}pp" if share else f"{number:+,.{digits}f}"
        return f"{number:.1%}" if share else f"{number:,.{digits}f}"

    if interval and _has_interval(measured):
        return f"{one(value)} [{one(low)}, {one(high)}]"
    return one(value)
