"""Values lie where their axis says, ticks stand apart, and labels stay inside the picture."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.report.charts import CHARACTER, Dot, Mark, Scatter, rate_axis, ratio_axis, scatter, whisker
from pipeline.report.figures import floor_share, megabytes, percent, times, times_interval
from pipeline.report.schema import Interval, PlainRatio, Ratio

RATIOS = st.lists(st.floats(0.001, 1000.0), min_size=1, max_size=12)


@settings(deadline=None)
@given(RATIOS)
def test_every_ratio_lies_on_the_axis_and_larger_ones_further_right(values: list[float]) -> None:
    axis = ratio_axis(values)
    places = [axis.at(v) for v in sorted(values)]
    assert places == sorted(places)
    assert all(0 < place < 100 for place in places)
    assert 0 < axis.at(1.0) < 100


@settings(deadline=None)
@given(RATIOS)
def test_ticks_say_where_they_stand_and_keep_their_distance(values: list[float]) -> None:
    for axis in (ratio_axis(values), rate_axis(values)):
        places = [tick.at for tick in axis.ticks]
        assert all(b - a >= 13.99 for a, b in pairwise(places))
        for tick in axis.ticks:
            assert axis.at(float(tick.label.replace(",", ""))) == pytest.approx(tick.at, abs=0.6)
    assert "1" in [tick.label for tick in ratio_axis(values).ticks]


def test_an_axis_bears_what_is_not_finite() -> None:
    assert ratio_axis([math.inf, math.nan, 0.0, 2.0]).at(2.0) == ratio_axis([2.0]).at(2.0)
    assert rate_axis([math.nan]).at(0.5) > 0


def test_a_whisker_is_where_its_interval_is() -> None:
    axis = ratio_axis([0.5, 2.0])
    found = whisker(axis, Ratio(ratio=1.0, low=0.5, high=2.0, verdict="inconclusive"))
    assert found is not None
    assert (found.at, found.low, found.high) == (50.0, axis.at(0.5), axis.at(2.0))
    assert found.width == pytest.approx(found.high - found.low)
    assert whisker(axis, Interval(median=1.0, low=0.0, high=math.inf)) is None


def drawn(places: list[tuple[float, float]]) -> Scatter:
    dots = [
        Dot(
            f"stage_{i}",
            Interval(median=x, low=x * 0.9, high=x * 1.1),
            PlainRatio(ratio=y, low=y, high=y),
            i < 2,
            i == 0,
        )
        for i, (x, y) in enumerate(places)
    ]
    return scatter(dots, width=360, height=400, font=13, longest=16)


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(1.0, 5000.0), st.floats(0.9, 8.0)), min_size=1, max_size=10))
def test_points_and_labels_stay_inside_the_picture(places: list[tuple[float, float]]) -> None:
    chart = drawn(places)
    for mark in chart.marks:
        assert chart.left <= mark.x_low <= mark.x <= mark.x_high <= chart.right
        assert chart.top <= mark.y <= chart.bottom
        assert 0 <= mark.label_x <= chart.width
        assert 0 <= mark.label_y <= chart.height


def test_faster_is_right_and_better_is_up() -> None:
    slow, fast = drawn([(10.0, 1.0), (100.0, 1.5)]).marks
    assert slow.x < fast.x
    assert slow.y < fast.y  # down the screen: a higher perplexity


def test_the_front_is_a_staircase_through_its_points() -> None:
    chart = drawn([(10.0, 1.0), (100.0, 1.5), (50.0, 3.0)])
    a, b, _ = chart.marks
    assert chart.front == f"{a.x},{a.y} {a.x},{b.y} {b.x},{b.y}"


def test_labels_of_neighbours_do_not_lie_upon_each_other() -> None:
    chart = drawn([(100.0, 1.0), (101.0, 1.0), (102.0, 1.0), (500.0, 2.0)])
    heights = [(m.label_x, m.label_y, m.anchor) for m in chart.marks]
    assert len(set(heights)) == len(heights)


def box(mark: Mark, font: int) -> tuple[float, float, float, float]:
    """Where a label stands: left, top, right, bottom."""
    width, height = len(mark.shown) * font * CHARACTER, font * 1.15
    left = {"start": mark.label_x, "end": mark.label_x - width, "middle": mark.label_x - width / 2}[mark.anchor]
    return left, mark.label_y - height / 2, left + width, mark.label_y + height / 2


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([100.0, 100.5, 180.0]), st.sampled_from([1.0, 1.05])), min_size=2, max_size=9)
)
def test_no_label_covers_another_however_crowded_the_points_are(places: list[tuple[float, float]]) -> None:
    chart = drawn(places)
    boxes = [box(m, chart.font) for m in chart.marks]
    for i, a in enumerate(boxes):
        for b in boxes[i + 1 :]:
            assert min(a[2], b[2]) - max(a[0], b[0]) <= 0.2 or min(a[3], b[3]) - max(a[1], b[1]) <= 0.2


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (times(6.753), "6.75 ×"),
        (times(1.0021), "1.002 ×"),
        (times(None), "not finite"),
        (times_interval(6.753, Interval(median=1, low=5.64, high=8.069)), "5.64–8.07"),
        (percent(0.0163), "1.6 %"),
        (percent(floor_share(0.9842, 1.0133)), "1.6 %"),
        (percent(floor_share(0.99, 1.02)), "2.0 %"),
        (percent(floor_share(0.0, 2.0)), "inf %"),
        (megabytes(4_402_500_000), "4.40 GB"),
    ],
)
def test_figures_are_written_alike_everywhere(said: str, expected: str) -> None:
    assert said == expected
