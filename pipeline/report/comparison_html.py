"""A comparison of two runs as one HTML file that needs nothing else: no script, no font, no image, no request."""

from __future__ import annotations

from typing import NamedTuple

from pipeline.report import comparison_words as words
from pipeline.report.charts import Tick, Whisker, ratio_axis, whisker
from pipeline.report.comparison import ComparedSpeed, ComparedStage, Comparison
from pipeline.report.html import SYMBOLS, data_link
from pipeline.report.page import render_page
from pipeline.report.points import point_in_words
from pipeline.report.printable import without_controls
from pipeline.report.schema import PointKey


class Row(NamedTuple):
    """One stage at one workload point."""

    stage: ComparedStage
    point: ComparedSpeed
    mark: Whisker | None


class Chart(NamedTuple):
    """All stages at one workload point."""

    title: str
    rows: tuple[Row, ...]
    one: float
    ticks: tuple[Tick, ...]


def render_comparison_html(comparison: Comparison) -> str:
    """The whole page."""
    exact, comparison = comparison, without_controls(comparison)
    return render_page(
        "comparison.html.j2",
        comparison=comparison,
        words=words,
        symbols=SYMBOLS,
        headline=words.headline(comparison),
        outcome=words.outcome(comparison),
        charts=_charts(comparison),
        json_link=data_link("application/json", exact.to_json()),
    )


def _charts(comparison: Comparison) -> list[Chart]:
    points: dict[PointKey, ComparedSpeed] = {}
    for stage in comparison.stages:
        for point in stage.speed:
            points.setdefault(point.point, point)
    return [_chart(point, comparison) for point in points.values()]


def _chart(at: ComparedSpeed, comparison: Comparison) -> Chart:
    found = [(s, p) for s in comparison.stages for p in s.speed if p.point == at.point]
    ratios = [p.ratio for _, p in found if p.ratio is not None]
    # one wild interval may not push all others into a corner
    axis = ratio_axis([v for r in ratios for v in (r.ratio, max(r.low, r.ratio / 2), min(r.high, r.ratio * 2))])
    return Chart(
        title=point_in_words(at),
        rows=tuple(Row(s, p, whisker(axis, p.ratio) if p.ratio is not None else None) for s, p in found),
        one=axis.at(1.0),
        ticks=axis.ticks,
    )
