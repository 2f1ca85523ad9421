"""A median over rounds, and how far it may be off: the estimator behind every interval of a report.

The model of one value y (the logarithm of a block's time, or of the ratio of two blocks of one round) is

    y[launch, round] = truth + a[launch] + e[launch, round]

where `a` is what a process happened to get when it was started (allocation layout, huge pages, page cache), and `e` the
noise of a block, with tails as heavy as they come. The estimate is the median of all y. Its variance has two parts:

- rounds: that of a median, from the median distance between two rounds of a launch (a relative of Rousseeuw and Croux's
  estimators, 1993), which neither outliers nor the number of rounds in a launch disturb;
- launches: their variance times the share of a launch, summed. Three launches say next to nothing about a variance
  (Student's t with two degrees of freedom), so it is moderated as Smyth (2004) does for genes: a weighted mean of the
  stage's own, of that of the other stages at the same point, and of an assumed one (LAUNCH_SD), each with weight of its
  degrees of freedom. The other stages count for POOL_FREEDOM launches at most, and for less the less likely it is that
  the stage's launches vary as theirs do. With one launch only the assumed one is left.

The interval is Student's t with Satterthwaite's degrees of freedom. Everything works on arrays of shape [T]: T is 1 for
a report and the number of trials in benchmarks/statistics_power.py, which simulates how often the interval covers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

CONFIDENCE = 0.95

LAUNCH_SD = 0.005
"""Assumed standard deviation of what one process's launches add to the logarithm of its time: half a percent.

It is all that is known with one launch. A report's A/A launches show what it is on a host.
"""

PRIOR_FREEDOM = 2.0
"""Weight of the assumption, in degrees of freedom: as much as three launches of the stage itself."""

POOL_FREEDOM = 6.0
"""Most degrees of freedom that the other stages count for."""

COMMON_BASELINE = 0.25
"""Correlation of the variances of two ratios that have the baseline in common."""

PAIRS_EFFICIENCY = 0.85
"""Degrees of freedom of the median distance between two rounds, over those of a variance, for normal values."""

MEDIAN_VARIANCE = math.pi / 2
"""Variance of a median over that of a mean, for many normal values."""

QUARTILE = 0.6744897501960817
"""Median of the absolute value of a standard normal variable."""


@dataclass(frozen=True, eq=False)
class Seen:
    """What the rounds of one stage, or of a pair, say by themselves; arrays of shape [T]."""

    rounds: int
    launches: int
    center: np.ndarray  # median of all rounds
    noise: np.ndarray  # standard deviation of a round within its launch, robust
    within: np.ndarray  # variance of the center that comes from rounds
    within_freedom: float
    between: np.ndarray  # variance among launches, unbiased and so perhaps negative
    between_freedom: float  # 0 with one launch
    concentration: float  # sum of squared shares of the launches: 1 with one, 1/n with n equal ones
    launch_noise: np.ndarray  # what `within` is for the launches' own medians


@dataclass(frozen=True, eq=False)
class Estimate:
    """A center with its standard error; arrays of shape [T]."""

    center: np.ndarray
    error: np.ndarray
    freedom: np.ndarray

    def half_width(self, alpha: float = 1 - CONFIDENCE) -> np.ndarray:
        """Half the width of the two-sided interval that misses the truth with probability `alpha`."""
        from scipy import stats

        half: np.ndarray = stats.t.isf(alpha / 2, self.freedom) * self.error
        return half


def look_at(values: np.ndarray, launches: np.ndarray) -> Seen:
    """Center and variances of `values` [T, rounds], whose columns belong to `launches` [rounds].

    Neither the order of rounds nor that of launches matters, and negated values give the negated center.
    Raises: ValueError below two rounds.
    """
    import numpy as np

    values = np.asarray(values, dtype=np.float64)
    rounds = values.shape[1]
    if rounds < 2:
        raise ValueError("one round has no variance")
    groups = [values[:, launches == launch] for launch in np.unique(launches)]
    groups.sort(key=lambda group: group.shape[1])
    counts = np.array([group.shape[1] for group in groups])
    center = np.median(values, axis=1)
    medians = np.stack([np.median(group, axis=1) for group in groups], axis=1)  # [T, launches]
    noise = _distance(groups if rounds > len(groups) else [values])
    within_freedom = max(1.0, PAIRS_EFFICIENCY * (rounds - len(groups) if rounds > len(groups) else rounds - 1))
    shares = counts / rounds
    concentration = float((shares**2).sum())
    launch_variance = noise[:, None] ** 2 * _median_variance(counts)  # of each median, from its rounds
    between = np.zeros_like(center)
    if len(groups) > 1:
        mean = (shares * medians).sum(axis=1, keepdims=True)
        squares = (shares * (medians - mean) ** 2).sum(axis=1)
        expected = (shares * (1 - shares) * launch_variance).sum(axis=1)
        between = (squares - expected) / (1 - concentration)
    return Seen(
        rounds=rounds,
        launches=len(groups),
        center=center,
        noise=noise,
        within=noise**2 * float(_median_variance(np.array(rounds))),
        within_freedom=within_freedom,
        between=between,
        between_freedom=1 / concentration - 1 if len(groups) > 1 else 0.0,
        concentration=concentration,
        launch_noise=(shares**2 * launch_variance).sum(axis=1),
    )


def estimate(seen: Seen, others: Sequence[Seen] = (), *, processes: int = 2) -> Estimate:
    """The estimate of one stage or pair, its launches' variance moderated by that of `others` at the same point.

    `processes` is how many processes the value compares: two for a ratio, one for a time.
    """
    import numpy as np

    prior = np.full_like(seen.center, processes * LAUNCH_SD**2)
    weight = PRIOR_FREEDOM + seen.between_freedom
    total = PRIOR_FREEDOM * prior + seen.between_freedom * seen.between
    pool_weight = np.zeros_like(seen.center)
    telling = [other for other in others if other.between_freedom > 0]
    if telling and seen.between_freedom > 0:
        freedoms = [other.between_freedom for other in telling]
        pooled = np.average(np.stack([other.between for other in telling]), axis=0, weights=freedoms)
        freedom = sum(freedoms) / (1 + COMMON_BASELINE * (len(telling) - 1))
        pool_weight = min(POOL_FREEDOM, freedom) * _alike(seen, pooled, freedom)
        total = total + pool_weight * pooled
    freedom_of_launches = weight + pool_weight
    # rounds that are all alike, to the last digit, say nothing of launches: what is assumed of those stands
    least = np.where(seen.within > 0, 0.0, PRIOR_FREEDOM * prior / freedom_of_launches)
    among = seen.concentration * np.maximum(total / freedom_of_launches, least)
    variance = seen.within + among
    spread = among**2 / freedom_of_launches + seen.within**2 / seen.within_freedom
    positive = spread > 0
    freedom_of_all = np.where(positive, variance**2 / np.where(positive, spread, 1.0), seen.within_freedom)
    return Estimate(center=seen.center, error=np.sqrt(variance), freedom=np.maximum(freedom_of_all, 1.0))


def estimates(seen: Sequence[Seen]) -> list[Estimate]:
    """The estimates of pairs that have one stage in common at one point, each moderated by all the others."""
    return [estimate(one, [*seen[:i], *seen[i + 1 :]]) for i, one in enumerate(seen)]


def _alike(seen: Seen, pooled: np.ndarray, freedom: float) -> np.ndarray:
    """From 1, where the stage's launches vary no more than half of such stages', down to 0, where far more."""
    import numpy as np
    from scipy import stats

    own = np.maximum(seen.concentration * seen.between + seen.launch_noise, 0.0)
    expected = seen.concentration * np.maximum(pooled, 0.0) + seen.launch_noise
    ratio = np.divide(own, expected, out=np.ones_like(own), where=expected > 0)
    likely: np.ndarray = np.minimum(1.0, 2 * stats.f.sf(ratio, seen.between_freedom, freedom))
    return likely


def _distance(groups: Sequence[np.ndarray]) -> np.ndarray:
    """Standard deviation of normal values whose distances within `groups` ([T, rounds] each) have the same median."""
    import numpy as np

    distances = []
    for group in groups:
        one, other = np.triu_indices(group.shape[1], 1)
        distances.append(np.abs(group[:, one] - group[:, other]))
    found: np.ndarray = np.median(np.concatenate(distances, axis=1), axis=1) / (QUARTILE * math.sqrt(2))
    return found


def _median_variance(counts: np.ndarray) -> np.ndarray:
    """Variance of the median of so many standard normal values; exact for 1, 2 and many, within 3 % between."""
    import numpy as np

    asymptote = MEDIAN_VARIANCE / counts
    small: np.ndarray = asymptote * counts / (counts + np.where(counts % 2 == 1, 1.0, 2.0) * (MEDIAN_VARIANCE - 1))
    return small
