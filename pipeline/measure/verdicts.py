"""What may be claimed: faster, slower, equivalent, or nothing yet.

A claim holds at a level where the interval of that level supports it: `faster` and `slower` where it lies wholly beyond
the margin and beyond the noise floor, `equivalent` where it lies wholly inside the margin and the floor does, too.
Every comparison has a strictest level at which one of them holds; there is at most one claim, because an interval
cannot be beyond the margin and inside it. The comparisons of a table are then taken in the order of these levels, as
Holm (1979) does with p-values: the first of m has to hold at alpha / m, the next at alpha / (m - 1), and so on; after
the first that does not, all are `inconclusive`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pipeline.measure.estimate import Estimate
from pipeline.measure.looks import MARGIN

if TYPE_CHECKING:
    import numpy as np

Verdict = Literal["faster", "slower", "equivalent", "inconclusive"]
CLAIMS: tuple[Verdict, ...] = ("inconclusive", "faster", "slower", "equivalent")
"""Verdicts by their number in the arrays of this module."""

MOST_ROUNDS = 100_000
"""A number of rounds beyond which nobody would go: no number is named."""


def verdict(low: float, high: float, *, margin: float = MARGIN, floor: tuple[float, float] = (1.0, 1.0)) -> Verdict:
    """What one interval [low, high] of a speed ratio allows to claim, beside a noise floor of such a ratio."""
    edge = math.log1p(margin)
    noise = max(abs(math.log(end)) for end in floor)
    bar = max(edge, noise)
    if math.log(low) > bar:
        return "faster"
    if math.log(high) < -bar:
        return "slower"
    if -edge <= math.log(low) and math.log(high) <= edge and noise <= edge:
        return "equivalent"
    return "inconclusive"


def noise_floor(again: Estimate) -> np.ndarray:
    """How far two equal processes may differ: the far end of the A/A interval, as a logarithm, [T].

    It is taken as symmetric: two equal processes that differed by 3 % in one direction might as well in the other.
    """
    import numpy as np

    floor: np.ndarray = np.abs(again.center) + again.half_width()
    return floor


def strictest(pair: Estimate, floor: np.ndarray, *, margin: float) -> tuple[np.ndarray, np.ndarray]:
    """(number of the claim in CLAIMS, least alpha whose two-sided interval supports it) for the log ratio, each [T].

    The level is 1 where nothing can be claimed. An unknown floor is infinite: then nothing is.
    """
    import numpy as np
    from scipy import stats

    edge = math.log1p(margin)
    beyond = np.abs(pair.center) - np.maximum(edge, floor)
    inside = np.where(floor <= edge, edge - np.abs(pair.center), -np.inf)
    room = np.maximum(beyond, inside)
    signs = np.where(pair.center > 0, 1, 2)
    claim = np.where(room > 0, np.where(beyond > inside, signs, 3), 0)
    level: np.ndarray = np.where(claim > 0, 2 * stats.t.sf(np.maximum(room, 0.0) / pair.error, pair.freedom), 1.0)
    return claim, level


def holm(levels: np.ndarray, alpha: float) -> np.ndarray:
    """Which of the claims with such `levels` [comparisons, T] hold together, with probability `alpha` of any error."""
    import numpy as np

    count = len(levels)
    order = np.argsort(levels, axis=0, kind="stable")
    steps = alpha / (count - np.arange(count))
    passed = np.take_along_axis(levels, order, axis=0) <= steps[:, None]
    held = np.logical_and.accumulate(passed, axis=0)
    found = np.zeros_like(held)
    np.put_along_axis(found, order, held, axis=0)
    return found


def verdicts(
    pairs: Sequence[Estimate], floors: Sequence[np.ndarray], *, margin: float, alpha: float
) -> tuple[np.ndarray, np.ndarray]:
    """(numbers in CLAIMS [comparisons, T], level that an undecided one would have to reach [T]) of one table.

    The two-sided interval at that level is never narrower than the printed one as long as `alpha` is at most 5 %: what
    is claimed never contradicts the interval beside it.
    """
    import numpy as np

    found = [strictest(pair, floor, margin=margin) for pair, floor in zip(pairs, floors, strict=True)]
    claims, levels = np.stack([claim for claim, _ in found]), np.stack([level for _, level in found])
    held = holm(levels, alpha)
    undecided = (~held).sum(axis=0)
    return np.where(held, claims, 0), alpha / np.maximum(undecided, 1)


def rounds_to_decide(pair: Estimate, again: Estimate, *, rounds: int, margin: float, alpha: float) -> int | None:
    """Rounds in all after which `pair` (T = 1) would be decided if center and noise stayed as they are.

    Launches are thought to be added in proportion. None where no number would do: the center lies on the margin, or
    under what two equal processes differed by.
    """
    import numpy as np

    def decided(count: int) -> bool:
        more = count / rounds
        later, floor = (
            Estimate(center=e.center, error=e.error / math.sqrt(more), freedom=e.freedom * more) for e in (pair, again)
        )
        claim, level = strictest(later, noise_floor(floor), margin=margin)
        return bool(np.all((claim > 0) & (level <= alpha)))

    low, high = rounds, rounds
    while not decided(high):
        if high >= MOST_ROUNDS:
            return None
        low, high = high, 2 * high
    while high - low > max(1, high // 100):
        middle = (low + high) // 2
        low, high = (low, middle) if decided(middle) else (middle, high)
    return high
