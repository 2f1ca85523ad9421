"""How figures are written, in the terminal, in Markdown and in HTML: the same value reads the same everywhere."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Protocol

ABSENT = "–"
MARGIN = 0.01
"""The equivalence margin of a report that does not say its own."""

MOST_DIGITS = 6

USABLE_FLOOR = 10.0
"""A noise floor of that share or more is no figure but the sign that nothing was learnt, as after three wild rounds."""

CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""What a terminal or a page would obey and not show: control characters but for tab and end of line, what turns the
direction of text, and halves of characters, which cannot be written at all."""


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


def duration(value: float) -> str:
    """A time with three significant digits, in the unit that suits it."""
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if value * scale >= 0.9995 or unit == "µs":
            break
    return f"{_three_digits(value * scale)} {unit}"


def duration_interval(median: float, figure: Bounded) -> str:
    """The ends in the median's unit, which stands behind them."""
    if figure.low is None or figure.high is None:
        return ABSENT
    unit = duration(median).split()[1]
    scale = {"s": 1.0, "ms": 1e3, "µs": 1e6}[unit]
    digits = _digits_for_three(median * scale)
    high = f"{figure.high * scale:,.{digits}f}" if math.isfinite(figure.high) else "∞"
    return f"{figure.low * scale:,.{digits}f}–{high} {unit}"


def thousands(value: float | None) -> str:
    """A large count with its SI prefix: `2.20 G`."""
    if value is None:
        return ABSENT
    for prefix, scale in (("", 1.0), ("k", 1e3), ("M", 1e6), ("G", 1e9), ("T", 1e12)):
        if value < 999.5 * scale or prefix == "T":
            break
    return f"{value:,.0f}" if not prefix else f"{_three_digits(value / scale)} {prefix}"


def number(value: float | None, spec: str) -> str:
    return ABSENT if value is None else format(value, spec)


def percent(share: float | None) -> str:
    if share is None:
        return ABSENT
    digits = 1 if abs(share) < 10 else 0
    return f"{100 * share:,.{digits}f} %"


def rate(value: float) -> str:
    """Tokens a second."""
    return f"{value:,.{rate_digits(value)}f}"


def rate_digits(value: float) -> int:
    return 0 if value >= 100 else 1


def rate_interval(median: float, figure: Bounded) -> str:
    """The ends, with as many digits as the median has."""
    return _ends(figure, rate_digits(median))


def times(ratio: float | None) -> str:
    """A ratio alone, with as many digits as tell it from 1: `6.75 ×`, `1.002 ×`."""
    return "not finite" if ratio is None else f"{ratio:,.{ratio_digits(ratio)}f} ×"


def times_interval(ratio: float, figure: Bounded, margin: float = MARGIN) -> str:
    """The ends of a ratio's interval, none of them rounded across 1 or an edge of the margin, or onto one."""
    return _ends(figure, ratio_digits(ratio), (1.0, 1.0 + margin, 1.0 / (1.0 + margin)))


def ratio_digits(ratio: float) -> int:
    if abs(ratio - 1) < 0.1:
        return 3
    if 0 < ratio < 0.1:
        return _digits_for_three(ratio)
    return 2 if ratio < 10 else 1 if ratio < 100 else 0


def finer_times(ratio: float | None) -> str:
    """A ratio of perplexities, where the fourth digit tells."""
    return "not finite" if ratio is None else f"{ratio:,.{finer_digits(ratio)}f} ×"


def finer_interval(ratio: float | None, figure: Bounded) -> str:
    """The ends of an interval of perplexity ratios, none of them rounded across 1."""
    if ratio is None:
        return ABSENT
    return _ends(figure, finer_digits(ratio), (1.0,))


def finer_digits(ratio: float) -> int:
    return 4 if ratio < 10 else 2 if ratio < 1000 else 0


def floor_share(low: float, high: float) -> float:
    """The noise floor as one share: the larger of its two ends' distances from 1, as the verdicts take it."""
    if low <= 0 or not math.isfinite(high):  # rounds so wild that their interval has no end
        return math.inf
    return math.expm1(max(abs(math.log(low)), abs(math.log(high))))


def noise_floor_in_words(floor: float) -> str:
    """`the noise floor of 1.6 %`, or that there is no usable one."""
    return f"the noise floor of {percent(floor)}" if floor < USABLE_FLOOR else "a noise floor that is beyond all use"


def floor_in_table(floor: float | None) -> str:
    """The noise floor as a share, for a table."""
    if floor is None:
        return "not known"
    return percent(floor) if floor < USABLE_FLOOR else "no usable one"


def floor_interval(low: float, high: float) -> str:
    """The ratio of the baseline to itself, and the floor that it makes: `0.991–1.009: noise floor 0.9 %`."""
    if floor_share(low, high) >= USABLE_FLOOR:
        return "so wildly different that there is no usable noise floor"
    return f"{low:.3f}–{high:.3f}: noise floor {percent(floor_share(low, high))}"


def printable(text: str) -> str:
    """A stranger's words with every control character written out: `\\x1b`, and nothing moves the cursor."""
    return CONTROL.sub(lambda found: _written(ord(found.group())), text)


def _written(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def gate_value(value: float | None) -> str:
    large = value is not None and abs(value) >= 1e4
    return number(value, ",.0f" if large else ".5g")


def _ends(figure: Bounded, digits: int, limits: Sequence[float] = ()) -> str:
    if figure.low is None or figure.high is None:
        return ABSENT
    return f"{_end(figure.low, digits, limits)}–{_end(figure.high, digits, limits)}"


def _end(value: float, least: int, limits: Sequence[float]) -> str:
    """One end with at least so many digits, and as many as keep it on its own side of every limit."""
    if limits and abs(value - 1) < 10.0**-MOST_DIGITS:  # 1 for whoever reads it
        return f"{1:.{least}f}"
    digits = next((d for d in range(least, MOST_DIGITS) if _keeps_side(value, d, limits)), max(least, MOST_DIGITS))
    return f"{value:,.{digits}f}"


def _keeps_side(value: float, digits: int, limits: Sequence[float]) -> bool:
    shown = round(value, digits)
    return all((value > limit) == (shown > limit) and (value < limit) == (shown < limit) for limit in limits)


def _three_digits(value: float) -> str:
    return f"{value:,.{_digits_for_three(value)}f}"


def _digits_for_three(value: float) -> int:
    """Decimals that make three significant digits; none where there are three before the point."""
    return max(0, 2 - math.floor(math.log10(float(f"{value:.3g}")))) if value > 0 else 0
