"""Geometry of the report's charts: where values lie on an axis, and where labels find room. Draws nothing itself."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from pipeline.report.schema import Interval, PlainRatio, Ratio

NICE = (1.0, 2.0, 5.0)
LINEAR_UP_TO = 3.0
"""An axis whose ends differ by no more than this factor is linear, a longer one logarithmic."""

CHARACTER = 0.68
"""Mean width of a character over the height of the font."""


MOST_LINES = 12
"""Lines that a label may stand above or below its point, to which a leader then joins it."""


class Tick(NamedTuple):
    at: float
    """Percent of the axis."""
    label: str


class Axis(NamedTuple):
    """From a value to a percentage of the axis' length."""

    low: float
    high: float
    logarithmic: bool
    ticks: tuple[Tick, ...] = ()

    def at(self, value: float) -> float:
        """Percent from the lower end; values beyond an end are put on it."""
        low, high, v = (
            (math.log(self.low), math.log(self.high), math.log(max(value, 1e-300)))
            if self.logarithmic
            else (self.low, self.high, value)
        )
        return round(min(100.0, max(0.0, 100 * (v - low) / (high - low))), 2)


class Whisker(NamedTuple):
    """A dot and its interval, in percent of the axis."""

    at: float
    low: float
    high: float

    @property
    def width(self) -> float:
        return round(self.high - self.low, 2)


class Mark(NamedTuple):
    """A point of a scatter chart, in pixels, and its label."""

    name: str
    shown: str
    x: float
    y: float
    x_low: float
    x_high: float
    y_low: float
    y_high: float
    label_x: float
    label_y: float
    anchor: str
    leader: bool
    """Whether a line has to join the label to its point."""
    on_front: bool
    is_baseline: bool


class Dot(NamedTuple):
    """What is to be drawn as one point of a scatter chart."""

    name: str
    x: Interval
    y: PlainRatio
    on_front: bool
    is_baseline: bool


class Scatter(NamedTuple):
    """A scatter chart of a given size in pixels. Better is up and to the right."""

    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int
    font: int
    marks: tuple[Mark, ...]
    front: str
    """Points of the line through the Pareto front, for SVG."""
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]


def ratio_axis(values: Iterable[float]) -> Axis:
    """A logarithmic axis over ratios that always shows 1."""
    usable = [v for v in values if math.isfinite(v) and v > 0]
    low, high = min([1.0, *usable]), max([1.0, *usable])
    room = max(math.log(high / low) * 0.06, math.log(1.004))
    low, high = low / math.exp(room), high * math.exp(room)
    axis = Axis(low, high, True)
    return axis._replace(ticks=_spaced(axis, [1.0, *_ratio_ticks(low, high)], 14.0))


def rate_axis(values: Iterable[float]) -> Axis:
    """A linear axis from zero."""
    high = max([v for v in values if math.isfinite(v)], default=1.0) or 1.0
    axis = Axis(0.0, high * 1.04, False)
    step = _nice_step(high, 3)
    return axis._replace(ticks=_spaced(axis, [i * step for i in range(int(high * 1.04 / step) + 1)], 42.0, "rate"))


def whisker(axis: Axis, figure: Ratio | Interval) -> Whisker | None:
    """None where the figure is not finite."""
    middle = figure.ratio if isinstance(figure, Ratio) else figure.median
    if not all(map(math.isfinite, (middle, figure.low, figure.high))):
        return None
    return Whisker(axis.at(middle), axis.at(figure.low), axis.at(figure.high))


def scatter(dots: Sequence[Dot], *, width: int, height: int, font: int, longest: int) -> Scatter:
    """Lay out a scatter chart; labels go where they cover neither a point nor one another, where there is room."""
    left, right, top, bottom = round(font * 4.6), font, font, round(font * 3.4)
    x_axis = _free_axis([v for d in dots for v in (d.x.median, *_within(d.x.low, d.x.high, d.x.median))])
    y_axis = _free_axis([v for d in dots for v in (d.y.ratio, d.y.low, d.y.high) if v is not None])
    inner_width, inner_height = width - left - right, height - top - bottom

    def across(value: float) -> float:
        return round(left + inner_width * x_axis.at(value) / 100, 1)

    def down(value: float) -> float:  # a lower perplexity is better, and better is up
        return round(top + inner_height * y_axis.at(value) / 100, 1)

    places = [(across(d.x.median), down(d.y.ratio if d.y.ratio is not None else 1.0)) for d in dots]
    taken: list[tuple[float, float, float, float]] = [(x - 7, y - 7, x + 7, y + 7) for x, y in places]
    marks = []
    for dot, (x, y) in zip(dots, places, strict=True):
        shown = dot.name if len(dot.name) <= longest else dot.name[: longest - 1] + "…"
        inside = (left, top, width - 2, height - bottom)
        size = (len(shown) * font * CHARACTER, font * 1.15)
        label_x, label_y, anchor, box = _label((x, y), size, taken, inside)
        taken.append(box)
        low, high = dot.y.low, dot.y.high
        marks.append(
            Mark(
                name=dot.name,
                shown=shown,
                x=x,
                y=y,
                x_low=across(dot.x.low),
                x_high=across(dot.x.high),
                y_low=down(low) if low is not None else y,
                y_high=down(high) if high is not None else y,
                label_x=label_x,
                label_y=label_y,
                anchor=anchor,
                leader=abs(label_y - y) > font,
                on_front=dot.on_front,
                is_baseline=dot.is_baseline,
            )
        )
    on_front = [(m.x, m.y) for m in marks if m.on_front]
    # of models that cannot be told apart, the line takes the one furthest up and right
    line = sorted(one for one in on_front if not any(o[0] >= one[0] and o[1] <= one[1] and o != one for o in on_front))
    steps: list[tuple[float, float]] = []
    for x, y in line:  # between two models of the front nothing is promised: a staircase, not a slope
        if steps:
            steps.append((steps[-1][0], y))
        steps.append((x, y))
    return Scatter(
        width=width,
        height=height,
        left=left,
        right=width - right,
        top=top,
        bottom=height - bottom,
        font=font,
        marks=tuple(marks),
        front=" ".join(f"{x},{y}" for x, y in steps),
        x_ticks=tuple(Tick(round(left + inner_width * t.at / 100, 1), t.label) for t in x_axis.ticks),
        y_ticks=tuple(Tick(round(top + inner_height * t.at / 100, 1), t.label) for t in y_axis.ticks),
    )


Box = tuple[float, float, float, float]


def _label(
    point: tuple[float, float], size: tuple[float, float], taken: Sequence[Box], inside: Box
) -> tuple[float, float, str, Box]:
    """(x, y, anchor, box) of the first place around the point that is free, else of the least covered one."""
    (x, y), (width, line), gap = point, size, 11.0
    candidates = []
    for lift in (0.0, *(sign * step for step in range(1, MOST_LINES + 1) for sign in (-1.0, 1.0))):
        middle = y + lift * line
        candidates.append((x + gap, middle, "start", (x + gap, middle - line / 2, x + gap + width, middle + line / 2)))
        candidates.append((x - gap, middle, "end", (x - gap - width, middle - line / 2, x - gap, middle + line / 2)))
        if lift:
            box = (x - width / 2, middle - line / 2, x + width / 2, middle + line / 2)
            candidates.append((x, middle, "middle", box))

    def covered(box: Box) -> float:
        outside = max(0.0, inside[0] - box[0]) + max(0.0, box[2] - inside[2])
        outside += max(0.0, inside[1] - box[1]) + max(0.0, box[3] - inside[3])
        return 1000 * outside + sum(_overlap(box, other) for other in taken)

    best = min(candidates, key=lambda c: covered(c[3]))  # the first of equals
    return round(best[0], 1), round(best[1], 1), best[2], best[3]


def _overlap(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _within(low: float, high: float, median: float) -> tuple[float, float]:
    """The interval's ends, but no farther from the median than a factor of two: one wild interval leaves room."""
    return max(low, median / 2), min(high, median * 2)


def _free_axis(values: Sequence[float]) -> Axis:
    """An axis over positive values with some room at its ends, linear where it is short."""
    low, high = min(values), max(values)
    if high <= LINEAR_UP_TO * low:
        room = max((high - low) * 0.12, abs(high) * 0.002)
        axis = Axis(low - room, high + room, False)
        step = _nice_step(axis.high - axis.low, 4)
        first = math.ceil(axis.low / step)
        values = [i * step for i in range(first, int(axis.high / step) + 1)]
        return axis._replace(ticks=_spaced(axis, values, 8.0, f"step {step}"))
    room = math.log(high / low) * 0.1
    axis = Axis(low / math.exp(room), high * math.exp(room), True)
    decades = range(math.floor(math.log10(axis.low)), math.ceil(math.log10(axis.high)) + 1)
    values = [n * 10.0**d for d in decades for n in NICE if axis.low <= n * 10.0**d <= axis.high]
    return axis._replace(ticks=_spaced(axis, values, 8.0, "rate"))


def _ratio_ticks(low: float, high: float) -> list[float]:
    if high / low <= 1.5:
        step = _nice_step(high - low, 5)
        return [round(i * step, 10) for i in range(math.ceil(low / step), int(high / step) + 1)]
    steps = (1.0, 2.0, 5.0) if high / low > 8 else (1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [n * 10.0**d for d in decades for n in steps]
    found += [] if high / low > 8 else [0.75, 0.9, 1.1]
    return sorted(v for v in found if low <= v <= high)


def _nice_step(length: float, count: int) -> float:
    """A step of 1, 2 or 5 times a power of ten that divides `length` into about `count` parts."""
    raw = length / count
    power = 10.0 ** math.floor(math.log10(raw))
    return float(next((n * power for n in NICE if n * power >= raw), 10 * power))


def _spaced(axis: Axis, values: Iterable[float], least: float, style: str = "ratio") -> tuple[Tick, ...]:
    """Ticks at the values, the first ones first, left out where they would stand closer than `least` percent."""
    kept: dict[float, Tick] = {}
    for value in values:
        at = axis.at(value)
        if all(abs(at - tick.at) >= least for tick in kept.values()):
            kept[value] = Tick(at, _tick_label(value, style))
    return tuple(kept[value] for value in sorted(kept))


def _tick_label(value: float, style: str) -> str:
    if style == "ratio":
        return f"{value:g}"
    if style.startswith("step"):
        digits = max(0, -math.floor(math.log10(float(style.removeprefix("step ")))))
        return f"{value:,.{digits}f}"
    return f"{value:,.0f}" if value == round(value) else f"{value:,.4g}"
