"""The curves of a run as inline SVG.

A drawing stretches with the page and its labels are HTML beside it, so text keeps its size on a
phone. Colours come from the page's style sheet, so one drawing serves light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

from markupsafe import Markup

GIB = 2**30
WIDTH, HEIGHT = 600, 200
MAX_POINTS = 600
"""Points a line may have; a longer one is drawn by the extremes of each stretch."""

GENERAL = {
    "forgetting_kl": "Forgetting: KL, nats per token",
    "forgetting_loss": "Loss on general prompts, nats per token",
}
"""Titles of what is measured on general prompts."""

Points = list[tuple[int, float]]


@dataclass(frozen=True)
class Tick:
    """A label of an axis. percent: where it stands, from the left or from the bottom."""

    percent: float
    label: str


@dataclass(frozen=True)
class Series:
    """One line of a panel. kind is its CSS class: raw, line, smooth or held-out."""

    label: str
    kind: str
    points: Points


@dataclass(frozen=True)
class Panel:
    """One picture with what its caption says. series: the measured ones come first.

    lost: steps whose value is missing or not finite; the line passes over them.
    """

    title: str
    note: str
    series: list[Series]
    lost: int
    svg: Markup
    x_ticks: list[Tick]
    y_ticks: list[Tick]

    @property
    def description(self) -> str:
        """What a screen reader says instead of the picture."""
        first, last = self.series[0].points[0], self.series[0].points[-1]
        return (
            f"{self.title}: {short(first[1])} at step {first[0]}, "
            f"{short(last[1])} at step {last[0]}"
        )


def panels(metrics: Sequence[dict[str, Any]]) -> list[Panel]:
    """The pictures of a run, the training loss first. What was never measured has none."""
    train = _of_kind(metrics, "train")
    held_out = _of_kind(metrics, "validation")
    names = dict.fromkeys(name for r in held_out for name in r if name not in ("kind", "step"))
    drawn = [_loss_panel(train, held_out)]
    drawn += [_held_out_panel(name, _points(held_out, name)) for name in names if name != "loss"]
    for title, field, unit, note in (
        ("Learning rate", "lr", 1, _peak),
        ("Gradient norm before clipping", "grad_norm", 1, _median_and_peak),
        ("Tokens per second", "tokens_per_second", 1, _median),
        ("Process memory, GiB", "anon_bytes", GIB, _peak),
        ("Device memory, GiB", "device_bytes", GIB, _peak),
    ):
        points = _points(train, field, unit)
        if field == "device_bytes" and not any(value for _, value in points):
            continue  # a run on a CPU
        lost = len(train) - len(points)
        drawn.append(_panel(title, [Series("each step", "line", points)], note, lost))
    return [panel for panel in drawn if panel]


def interval_svg(
    before: tuple[float, float, float] | None, after: tuple[float, float, float] | None
) -> Markup:
    """Shares (value, low, high) on a line from 0 to 1: before above, after below."""
    marks = []
    for kind, y, share in (("before", 6, before), ("after", 14, after)):
        if share is not None:
            value, low, high = (100 * min(max(part, 0.0), 1.0) for part in share)
            marks.append(
                f'<path class="whisker {kind}" d="M{low:.1f} {y}H{high:.1f}"/>'
                f'<path class="dot {kind}" d="M{value:.1f} {y}h.01"/>'
            )
    return Markup(  # nothing but numbers and our own words goes in
        '<svg class="interval" viewBox="0 0 100 20" preserveAspectRatio="none" '
        'aria-hidden="true"><path class="grid" d="M0 10H100M0 4V16M50 4V16M100 4V16"/>'
        f"{''.join(marks)}</svg>"
    )


def lower_is_better(metric: str) -> bool:
    """Whether a metric is a loss, a perplexity, bits_per_byte, a divergence or the error mae. Every
    other one, and every `module:function` of the user's, is better the higher it is."""
    falling = ("loss", "perplexity", "bits_per_byte", "mae", "_kl")
    return ":" not in metric and metric.lower().endswith(falling)


def is_share(metric: str, values: Iterable[float]) -> bool:
    """Whether values are shares of 1, to be shown as percentages. The range of a user's
    `module:function` is not known, so it is none."""
    plain = ":" in metric or lower_is_better(metric)
    return not plain and all(0 <= value <= 1 for value in values)


def short(value: float) -> str:
    """A number in at most about six characters, for axes and captions."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e6 or size < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:,.0f}" if size >= 1000 else f"{value:.3g}"


def _of_kind(metrics: Sequence[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return sorted((r for r in metrics if r.get("kind") == kind), key=lambda r: int(r["step"]))


def _points(records: list[dict[str, Any]], field: str, unit: float = 1) -> Points:
    return [
        (int(r["step"]), r[field] / unit)
        for r in records
        if isinstance(r.get(field), int | float) and math.isfinite(r[field])
    ]


def _loss_panel(train: list[dict[str, Any]], held_out: list[dict[str, Any]]) -> Panel | None:
    raw = _points(train, "loss")
    window = len(raw) // 20 | 1
    series = [Series("each step", "raw", raw)]
    if window >= 3:
        series.append(Series(f"mean of {window} steps", "smooth", _smooth(raw, window)))
    series.append(Series("held out", "held-out", _points(held_out, "loss")))
    lost = len(train) - len(raw)
    return _panel("Training loss, nats per token", series, _first_to_last, lost, from_zero=False)


def _held_out_panel(name: str, points: Points) -> Panel | None:
    if name in GENERAL:
        return _panel(GENERAL[name], [Series("general", "held-out", points)], _first_to_last)
    if is_share(name, (value for _, value in points)):
        name, points = f"{name}, %", [(step, 100 * value) for step, value in points]
    return _panel(name, [Series("held out", "held-out", points)], _first_to_last)


def _smooth(points: Points, window: int) -> Points:
    """The mean over a window centred on each point, so without lag; cut off at both ends."""
    totals = [0.0]
    for _, value in points:
        totals.append(totals[-1] + value)
    smooth = []
    for i, (step, _) in enumerate(points):
        start, stop = max(i - window // 2, 0), min(i + window // 2 + 1, len(points))
        smooth.append((step, (totals[stop] - totals[start]) / (stop - start)))
    return smooth


def _panel(
    title: str, series: list[Series], note: Any, lost: int = 0, *, from_zero: bool = True
) -> Panel | None:
    series = [one for one in series if one.points]
    if not series:
        return None
    last_step = max(step for one in series for step, _ in one.points)
    values = [value for one in series for _, value in one.points]
    y_values = _nice_ticks(min(0.0, *values) if from_zero else min(values), max(values))
    low, high = y_values[0], y_values[-1]
    x_values = [x for x in _nice_ticks(0, max(last_step, 1)) if x <= last_step and x == int(x)]

    def across(step: float) -> float:
        return step / max(last_step, 1)

    def up(value: float) -> float:
        return (value - low) / (high - low)

    grid = "".join(f"M0 {HEIGHT * (1 - up(y)):.1f}H{WIDTH}" for y in y_values)
    lines = "".join(
        f'<path class="{kind}" d="{_line(points, across, up)}"/>'
        for one in series
        for kind, points in _strokes(one)
    )
    svg = Markup(  # numbers and our own class names only: no text of the data goes in
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" aria-hidden="true">'
        f'<path class="grid" d="{grid}"/>{lines}</svg>'
    )
    return Panel(
        title,
        note([value for _, value in series[0].points]),
        series,
        lost,
        svg,
        [Tick(100 * across(x), f"{x:,.0f}") for x in x_values],
        [Tick(100 * up(y), short(y)) for y in y_values],
    )


def _strokes(series: Series) -> list[tuple[str, Points]]:
    """What to draw of a series, as (CSS class, points): the line, and dots where they are few."""
    strokes = [(series.kind, _thin(series.points))] if len(series.points) > 1 else []
    if len(series.points) == 1 or (series.kind == "held-out" and len(series.points) <= 60):
        strokes += [(f"dot {series.kind}", [point]) for point in series.points]
    return strokes


def _line(points: Points, across: Any, up: Any) -> str:
    if len(points) == 1:
        points = points * 2  # a stroke of no length: its round cap is the dot
    spots = (f"{WIDTH * across(s):.1f} {HEIGHT * (1 - up(v)):.1f}" for s, v in points)
    return "M" + "L".join(spots)


def _thin(points: Points) -> Points:
    """At most about MAX_POINTS of them: the lowest and the highest of each stretch, so that no
    spike is lost."""
    if len(points) <= MAX_POINTS:
        return points
    stretch = math.ceil(2 * len(points) / MAX_POINTS)
    kept: set[tuple[int, float]] = {points[0], points[-1]}
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        kept |= {min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])}
    return sorted(kept)


def _nice_ticks(low: float, high: float) -> list[float]:
    """Three to seven round numbers, evenly spaced, that enclose low and high."""
    if high - low < 1e-9 * max(abs(low), abs(high)) or high == low:
        pad = abs(high) / 2 or 1.0
        low, high = (low - pad if low < 0 else max(low - pad, 0.0)), high + pad
    rough = (high - low) / 4
    size = 10 ** math.floor(math.log10(rough))
    step = next(factor * size for factor in (1, 2, 5, 10) if factor * size >= rough * 0.9999)
    first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    return [i * step for i in range(first, last + 1)]


def _first_to_last(values: list[float]) -> str:
    return short(values[0]) if len(values) == 1 else f"{short(values[0])} → {short(values[-1])}"


def _peak(values: list[float]) -> str:
    return f"peak {short(max(values))}"


def _median(values: list[float]) -> str:
    return f"median {short(median(values))}"


def _median_and_peak(values: list[float]) -> str:
    return f"{_median(values)}, {_peak(values)}"


def summary_rows(drawn: list[Panel]) -> list[tuple[str, ...]]:
    """For a report without pictures: (curve, points, first, last, lowest, highest, mean)."""
    rows = []
    for panel in drawn:
        for one in panel.series:
            if one.kind == "smooth":
                continue  # the mean of another series, not a measurement
            values = [value for _, value in one.points]
            numbers = values[0], values[-1], min(values), max(values), mean(values)
            name = panel.title if one is panel.series[0] else f"{panel.title} ({one.label})"
            rows.append((name, f"{len(values):,}", *(short(number) for number in numbers)))
    return rows
