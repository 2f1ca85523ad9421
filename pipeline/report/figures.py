"""How figures are written, in the terminal, in Markdown and in HTML: the same value reads the same everywhere."""

from __future__ import annotations

import math
from typing import Protocol

ABSENT = "–"


class Bounded(Protocol):
    """A value between two ends."""

    @property
    def low(self) -> float | None: ...
    @property
    def high(self) -> float | None: ...


def megabytes(size: int | None) -> str:
    """Bytes as MB (10^6), or GB (10^9) with three digits or more."""
    if size is None:
        return ABSENT
    if size < 1e9:
        return f"{size / 1e6:.1f} MB"
    return f"{size / 1e9:.2f} GB" if size < 1e10 else f"{size / 1e9:.1f} GB"


def seconds(value: float | None) -> str:
    if value is None:
        return ABSENT
    return f"{value:.2f} s" if value < 10 else f"{value:.1f} s"


def number(value: float | None, spec: str) -> str:
    return ABSENT if value is None else format(value, spec)


def percent(share: float | None) -> str:
    return ABSENT if share is None else f"{share:.1%}".replace("%", " %")


def rate(value: float) -> str:
    """Tokens a second."""
    return f"{value:,.{rate_digits(value)}f}"


def rate_digits(value: float) -> int:
    return 0 if value >= 100 else 1


def rate_interval(median: float, figure: Bounded) -> str:
    """The ends, with as many digits as the median has."""
    return _ends(figure, rate_digits(median))


def times(ratio: float | None) -> str:
    """A ratio with as many digits as tell it from 1: `6.75 ×`, `1.002 ×`."""
    return "not finite" if ratio is None else f"{ratio:,.{ratio_digits(ratio)}f} ×"


def times_interval(ratio: float | None, figure: Bounded) -> str:
    return ABSENT if ratio is None else _ends(figure, ratio_digits(ratio))


def ratio_digits(ratio: float) -> int:
    if abs(ratio - 1) < 0.1:
        return 3
    return 2 if ratio < 10 else 1 if ratio < 100 else 0


def finer_times(ratio: float | None) -> str:
    """A ratio of perplexities, where the fourth digit tells."""
    return "not finite" if ratio is None else f"{ratio:,.{finer_digits(ratio)}f} ×"


def finer_interval(ratio: float | None, figure: Bounded) -> str:
    return ABSENT if ratio is None else _ends(figure, finer_digits(ratio))


def finer_digits(ratio: float) -> int:
    return 4 if ratio < 10 else 2 if ratio < 1000 else 0


def floor_share(low: float, high: float) -> float:
    """The noise floor as one share: the larger of its two ends' distances from 1, as the verdicts take it."""
    if low <= 0 or not math.isfinite(high):  # rounds so wild that their interval has no end
        return math.inf
    return math.expm1(max(abs(math.log(low)), abs(math.log(high))))


def gate_value(value: float | None) -> str:
    large = value is not None and abs(value) >= 1e4
    return number(value, ",.0f" if large else ".5g")


def _ends(figure: Bounded, digits: int) -> str:
    if figure.low is None or figure.high is None:
        return ABSENT
    return f"{figure.low:,.{digits}f}–{figure.high:,.{digits}f}"
