"""Geometry of a chart of time against size: one line a stage, with its intervals. Draws nothing itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from pipeline.report.cells_report import CellsReport, PointOverCells
from pipeline.report.charts import Axis, Tick
from pipeline.report.figures import duration, duration_interval

LOGARITHMIC_FROM = 3.0
"""An axis whose ends differ by this factor or more is logarithmic."""

SERIES = 32
"""Looks of a line, eight colours with four shapes each; with more stages they begin again."""


class TimeMark(NamedTuple):
    """One stage in one cell, in pixels."""

    x: float
    y: float
    low: float
    high: float
    told: str


class Line(NamedTuple):
    """One stage."""

    name: str
    look: int
    marks: tuple[TimeMark, ...]
    path: str
    """Points of the line, for SVG."""


class TimeChart(NamedTuple):
    """A chart of a given size in pixels; shorter times are lower."""

    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int
    font: int
    lines: tuple[Line, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    x_title: str
    y_title: str


def time_chart(report: CellsReport, point: PointOverCells, *, width: int, height: int, font: int) -> TimeChart | None:
    """Lay out the times of all stages over the sizes of the cells; None where nothing was measured."""
    labels = {cell.index: cell.label for cell in report.cells}
    shown = [
        (stage, [f for f in stage.figures if f.latency_s is not None and f.cell in report.axis.values])
        for stage in point.stages
    ]
    shown = [(stage, figures) for stage, figures in shown if figures]
    if not shown:
        return None
    medians = [f.latency_s.median for _, figures in shown for f in figures if f.latency_s]
    ends = [e for _, figures in shown for f in figures if f.latency_s for e in (f.latency_s.low, f.latency_s.high)]
    # one wild interval may not push all others into a corner
    usable = [e for e in ends if math.isfinite(e) and min(medians) / 2 < e < max(medians) * 2]
    y_axis, unit, scale = _time_axis([*medians, *usable])
    used = sorted({f.cell for _, figures in shown for f in figures}, key=lambda cell: report.axis.values[cell])
    x_axis = _size_axis([report.axis.values[cell] for cell in used])
    left, right, top, bottom = round(font * 4.4), width - font, font * 2, height - round(font * 4.2)
    across, down = right - left, bottom - top
    apart = min(font * 0.6, across / (4.0 * len(used) * len(shown)))

    def y(value: float) -> float:
        return round(bottom - down * y_axis.at(value * scale) / 100, 1)

    lines = []
    for i, (stage, figures) in enumerate(shown):
        aside = (i - (len(shown) - 1) / 2) * apart  # beside each other: equal times do not hide one another
        marks = []
        for figure in sorted(figures, key=lambda f: report.axis.values[f.cell]):
            time = figure.latency_s
            if time is None:
                continue
            x = round(left + across * x_axis.at(report.axis.values[figure.cell]) / 100 + aside, 1)
            told = (
                f"{stage.name}, {labels[figure.cell]}: {duration(time.median)} ({duration_interval(time.median, time)})"
            )
            marks.append(TimeMark(x, y(time.median), y(time.low), y(time.high), told))
        path = " ".join(f"{m.x},{m.y}" for m in marks)
        lines.append(Line(name=stage.name, look=i % SERIES, marks=tuple(marks), path=path))
    most = max(8, round(across / (len(used) + 0.5) / (font * 0.6)))
    x_ticks = [
        Tick(round(left + across * x_axis.at(report.axis.values[cell]) / 100, 1), _short(labels[cell], most))
        for cell in used
    ]
    return TimeChart(
        width=width,
        height=height,
        left=left,
        right=right,
        top=top,
        bottom=bottom,
        font=font,
        lines=tuple(lines),
        x_ticks=tuple(x_ticks),
        y_ticks=tuple(Tick(round(bottom - down * t.at / 100, 1), t.label) for t in y_axis.ticks),
        x_title=report.axis.title + (", logarithmic" if x_axis.logarithmic else ""),
        y_title=f"{unit}{', logarithmic' if y_axis.logarithmic else ''}",
    )


def _unit(seconds: float) -> tuple[str, float]:
    return ("s", 1.0) if seconds >= 1 else ("ms", 1e3) if seconds >= 1e-3 else ("µs", 1e6)


def _short(label: str, most: int) -> str:
    return label if len(label) <= most else label[: most - 1] + "…"


def _time_axis(values: Sequence[float]) -> tuple[Axis, str, float]:
    """(axis over the values in a unit, that unit, units in a second)."""
    unit, scale = _unit(max(values))
    low, high = min(values) * scale, max(values) * scale
    logarithmic = high >= LOGARITHMIC_FROM * low
    if logarithmic:
        room = math.exp(math.log(high / low) * 0.08)
        axis = Axis(low / room, high * room, True)
        decades = range(math.floor(math.log10(axis.low)), math.ceil(math.log10(axis.high)) + 1)
        ticks = [n * 10.0**d for d in decades for n in (1, 2, 5) if axis.low <= n * 10.0**d <= axis.high]
    else:
        room = max((high - low) * 0.15, high * 0.01)
        axis = Axis(max(0.0, low - room), high + room, False)
        step = _step((axis.high - axis.low) / 4)
        first, last = math.ceil(axis.low / step), math.floor(axis.high / step)
        ticks = [i * step for i in range(first, last + 1)]
    return axis._replace(ticks=tuple(Tick(axis.at(v), f"{v:,.6g}") for v in ticks)), unit, scale


def _step(raw: float) -> float:
    power = 10.0 ** math.floor(math.log10(raw))
    return next((n * power for n in (1.0, 2.0, 5.0) if n * power >= raw), 10 * power)


def _size_axis(values: Sequence[float]) -> Axis:
    low, high = min(values), max(values)
    if low == high:
        return Axis(low * 0.5, high * 1.5, False)
    if low > 0 and high >= LOGARITHMIC_FROM * low:
        room = math.exp(math.log(high / low) * 0.2)
        return Axis(low / room, high * room, True)
    room = (high - low) * 0.2
    return Axis(low - room, high + room, False)
