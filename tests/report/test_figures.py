"""A figure is never rounded to what it is not."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.report.figures import (
    MOST_DIGITS,
    duration,
    duration_interval,
    finer_interval,
    percent,
    thousands,
    times,
    times_interval,
)
from pipeline.report.schema import Interval

RATIO = st.floats(0.001, 1000.0)
MARGINS = st.sampled_from([0.01, 0.005, 0.02])


def ends(text: str) -> tuple[float, float]:
    low, high = text.replace(",", "").split("–")
    return float(low), float(high)


def told(value: float, limit: float) -> bool:
    """Whether so many digits can tell the two apart."""
    return abs(value - limit) > 10.0**-MOST_DIGITS


@given(RATIO, RATIO, RATIO, MARGINS)
def test_no_end_of_an_interval_is_rounded_across_one_or_the_margin(r: float, a: float, b: float, margin: float) -> None:
    low, high = min(a, b), max(a, b)
    shown = ends(times_interval(r, Interval(median=r, low=low, high=high), margin))
    for value, written in zip((low, high), shown, strict=True):
        for limit in (1.0, 1 + margin, 1 / (1 + margin)):
            if told(value, limit):
                assert (value > limit, value < limit) == (written > limit, written < limit)


@given(st.floats(1 - 1e-4, 1 + 1e-4), st.floats(0.5, 2.0))
def test_no_end_of_a_perplexity_ratio_is_rounded_across_one(value: float, other: float) -> None:
    low, high = min(value, other), max(value, other)
    shown = ends(finer_interval(1.0, Interval(median=1, low=low, high=high)))
    for end, written in zip((low, high), shown, strict=True):
        if told(end, 1.0):
            assert (end > 1, end < 1) == (written > 1, written < 1)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (times_interval(0.9, Interval(median=1, low=0.84, high=0.99999)), "0.840–0.99999"),
        (times_interval(1.02, Interval(median=1, low=1.00004, high=1.08)), "1.00004–1.080"),
        (times_interval(1.05, Interval(median=1, low=1.0101, high=1.09)), "1.0101–1.090"),
        (times_interval(1.05, Interval(median=1, low=1.0101, high=1.09), 0.005), "1.010–1.090"),
        (times_interval(1.2, Interval(median=1, low=1.0, high=1.5)), "1.00–1.50"),
        (times_interval(1.2, Interval(median=1, low=0.5, high=math.inf)), "0.50–inf"),
        (finer_interval(1.0, Interval(median=1, low=1 - 1e-9, high=1.00002)), "1.0000–1.00002"),
        (percent(76.1), "7,610 %"),
        (percent(0.0163), "1.6 %"),
        (times(0.0193), "0.0193 ×"),
        (times(0.12), "0.12 ×"),
        (duration(0.0454), "45.4 ms"),
        (duration(5.1001), "5.10 s"),
        (duration(0.99996), "1.00 s"),
        (duration(0.000231), "231 µs"),
        (duration_interval(0.0454, Interval(median=1, low=0.0449, high=0.1)), "44.9–100.0 ms"),
        (thousands(2.207e9), "2.21 G"),
        (thousands(512), "512"),
        (thousands(999_600), "1.00 M"),
        (thousands(None), "–"),
    ],
)
def test_figures_are_written_with_the_digits_that_tell(said: str, expected: str) -> None:
    assert said == expected


@given(st.floats(1e-7, 1e4))
def test_a_time_has_three_significant_digits_in_its_unit(value: float) -> None:
    number, unit = duration(value).split()
    scale = {"s": 1.0, "ms": 1e3, "µs": 1e6}[unit]
    assert float(number.replace(",", "")) == pytest.approx(value * scale, rel=0.006)
