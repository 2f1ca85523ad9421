"""From raw samples to figures with intervals, and to what may be claimed.

The unit is the logarithm of a block's time, or of the ratio of two blocks of the same round. pipeline.measure.estimate
makes intervals of them, pipeline.measure.verdicts claims, pipeline.measure.looks says when.

Two levels go together. The interval that is printed is the 95 % interval of that one figure. A verdict holds for the
whole table and all looks: it is taken from a wider interval, at the look's share of 5 %, divided among the comparisons
of the table (Holm). So a printed interval may lie beyond the margin while its verdict is still `inconclusive`; but what
is called faster, slower or equivalent always has a printed interval that says so.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import TYPE_CHECKING

from pydantic import Field

from pipeline.artifact import Frozen
from pipeline.measure.estimate import CONFIDENCE, Estimate, Seen, estimate, estimates, look_at
from pipeline.measure.looks import ALPHA, MARGIN, LookPlan
from pipeline.measure.samples import Sample
from pipeline.measure.verdicts import CLAIMS, Verdict, noise_floor, rounds_to_decide, verdict, verdicts
from pipeline.measure.workload import Kind, Point

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "CONFIDENCE",
    "Decision",
    "Decisions",
    "Interval",
    "NoiseFloor",
    "SpeedFigures",
    "SpeedPoint",
    "SpeedRatio",
    "Verdict",
    "compare_stages",
    "contrasts",
    "decide",
    "speed_figures",
    "verdict",
]

OUTLIER = 5.0
"""Robust standard deviations from the median of its launch beyond which a block is flagged."""

ENOUGH_FOR_OUTLIERS = 5
"""Rounds, less one a launch, below which the standard deviation is too uncertain to flag anything."""


class Interval(Frozen):
    """A median and its 95 % interval."""

    median: float
    low: float
    high: float


class SpeedRatio(Frozen):
    """How much faster: tokens per second over those of the other stage, in the same rounds. Above 1 is faster."""

    ratio: float
    low: float
    high: float
    verdict: Verdict
    inside_floor: bool = Field(default=False, description="whether the interval reaches into the noise floor")
    rounds_to_decide: int | None = Field(
        default=None, description="inconclusive only: rounds in all that would decide; None: no number would"
    )


class SpeedPoint(Frozen):
    """The speed of a stage at one point."""

    kind: Kind
    batch: int
    prompt: int
    new_tokens: int
    rounds: int
    launches: int
    outliers: int = Field(default=0, description="blocks far from the median of their launch; they stay in")
    tokens_per_s: Interval
    latency_s: Interval = Field(description="of a whole batch of prompts, or of one decoded token a sequence")
    vs_baseline: SpeedRatio | None = Field(
        default=None, description="None for the baseline, and where no two rounds have both"
    )
    vs_parent: SpeedRatio | None = None

    @property
    def point(self) -> Point:
        return Point(kind=self.kind, batch=self.batch, prompt=self.prompt, new_tokens=self.new_tokens)


class NoiseFloor(Frozen):
    """95 % interval of the ratio of two processes of the baseline at one point."""

    kind: Kind
    batch: int
    prompt: int
    new_tokens: int
    ratio_low: float
    ratio_high: float


class SpeedFigures(Frozen):
    """What the samples say."""

    stages: dict[str, tuple[SpeedPoint, ...]]
    noise_floor: tuple[NoiseFloor, ...]

    def without_claims(self) -> SpeedFigures:
        """The same figures with every verdict `inconclusive`."""

        def unclaimed(ratio: SpeedRatio | None) -> SpeedRatio | None:
            return None if ratio is None else ratio.model_copy(update={"verdict": "inconclusive"})

        def point(p: SpeedPoint) -> SpeedPoint:
            update = {"vs_baseline": unclaimed(p.vs_baseline), "vs_parent": unclaimed(p.vs_parent)}
            return p.model_copy(update=update)

        stages = {name: tuple(map(point, points)) for name, points in self.stages.items()}
        return self.model_copy(update={"stages": stages})


class Decision(Frozen):
    """The verdict on one stage at one point against the baseline, at the level of the look."""

    stage: str
    point: Point
    verdict: Verdict


class Decisions(Frozen):
    """What a look found."""

    look: int = Field(description="which, from 1")
    comparisons: tuple[Decision, ...]


def speed_figures(
    samples: Iterable[Sample],
    *,
    baseline: str,
    parents: Mapping[str, str | None],
    plan: LookPlan | None = None,
    looks_taken: int | None = None,
) -> SpeedFigures:
    """Figures of every stage at every point, in the order in which `parents` names the stages.

    `plan` gives the margin and the shares of the looks, `looks_taken` how many there were (default: all); without a
    plan the samples are taken as its one look. A point at which a stage has fewer than two rounds has no figure. A
    ratio takes the rounds that both stages have. The comparisons with the baseline are corrected together, and so are
    those with a parent that is not the baseline.
    """
    seen = _Blocks(samples, baseline)
    margin, alpha = _level(plan, looks_taken)
    wanted = [(stage, at) for stage in parents for at in seen.points]
    to_baseline = [_Pair(stage, baseline, at) for stage, at in wanted if stage != baseline]
    to_parent = [
        _Pair(stage, parent, at) for stage, at in wanted if (parent := parents[stage]) not in {None, stage, baseline}
    ]
    ratios = seen.ratios(to_baseline, margin=margin, alpha=alpha)
    ratios |= seen.ratios(to_parent, margin=margin, alpha=alpha)
    stages = {}
    for stage, parent in parents.items():
        figures = []
        for at in seen.points:
            spread = seen.time(stage, at)
            if spread is None:
                continue
            latency = _interval(estimate(spread, processes=1))
            tokens = at.tokens_per_iteration
            figures.append(
                SpeedPoint(
                    **at.model_dump(),
                    rounds=spread.rounds,
                    launches=spread.launches,
                    outliers=seen.outliers(stage, at, spread),
                    tokens_per_s=Interval(
                        median=tokens / latency.median, low=tokens / latency.high, high=tokens / latency.low
                    ),
                    latency_s=latency,
                    vs_baseline=ratios.get(_Pair(stage, baseline, at)),
                    vs_parent=ratios.get(_Pair(stage, parent, at)) if parent is not None else None,
                )
            )
        stages[stage] = tuple(figures)
    return SpeedFigures(stages=stages, noise_floor=tuple(seen.noise_floors()))


def decide(
    samples: Iterable[Sample], *, baseline: str, parents: Mapping[str, str | None], plan: LookPlan, look: int
) -> Decisions:
    """The verdict of every stage at every point against the baseline at the `look`-th look (from 1).

    They are those that `speed_figures` reports where this look is the last. A stage without figures is not waited for.
    """
    found = speed_figures(samples, baseline=baseline, parents=parents, plan=plan, looks_taken=look)
    return Decisions(
        look=look,
        comparisons=tuple(
            Decision(stage=stage, point=p.point, verdict=p.vs_baseline.verdict)
            for stage, points in found.stages.items()
            for p in points
            if p.vs_baseline is not None
        ),
    )


def compare_stages(
    samples: Iterable[Sample],
    stage: str,
    other: str,
    *,
    baseline: str,
    plan: LookPlan | None = None,
    looks_taken: int | None = None,
    comparisons: int = 1,
) -> dict[Point, SpeedRatio]:
    """How much faster `stage` is than `other` at every point, from the rounds that both have.

    `baseline` names the stage whose second process shows the noise. `comparisons` is the number of such pairs of stages
    that one table shows: each gets its part of the level, whose points are corrected together.
    """
    seen = _Blocks(samples, baseline)
    margin, alpha = _level(plan, looks_taken)
    pairs = [_Pair(stage, other, at) for at in seen.points]
    return {pair.point: ratio for pair, ratio in seen.ratios(pairs, margin=margin, alpha=alpha / comparisons).items()}


class Contrast(Frozen):
    """How much faster one stage is than another, from the rounds that both have: 95 % interval, of this pair alone."""

    stage: str
    other: str
    point: Point
    ratio: float
    low: float
    high: float


def contrasts(samples: Iterable[Sample], *, baseline: str, points: Sequence[Point]) -> Iterator[Contrast]:
    """Every two stages but the baseline, in the order of the samples, where two rounds have both."""
    seen = _Blocks(samples, baseline)
    others = [stage for stage in seen.stages if stage != baseline]
    for point in points:
        for stage, other in combinations(others, 2):
            if (found := seen.interval(_Pair(stage, other, point))) is not None:
                yield Contrast(
                    stage=stage, other=other, point=point, ratio=found.median, low=found.low, high=found.high
                )


@dataclass(frozen=True)
class _Pair:
    """A stage, the one that it is compared with, and where."""

    stage: str
    other: str
    point: Point


Rounds = Mapping[tuple[int, int], float]
"""Logarithm of the seconds of a block, by launch and round."""


class _Blocks:
    """The samples, and what they say of stages and pairs of stages."""

    def __init__(self, samples: Iterable[Sample], baseline: str) -> None:
        self.baseline = baseline
        self.rounds: dict[tuple[str, int, Point], dict[tuple[int, int], float]] = defaultdict(dict)
        for sample in samples:
            block = self.rounds[sample.stage, sample.replica, sample.point]
            block[sample.launch, sample.round] = math.log(sample.latency_s)
        self.points = list(dict.fromkeys(point for _, _, point in self.rounds))
        self.stages = list(dict.fromkeys(stage for stage, replica, _ in self.rounds if replica == 0))

    def time(self, stage: str, point: Point) -> Seen | None:
        return _look_at(self.rounds.get((stage, 0, point), {}))

    def outliers(self, stage: str, point: Point, seen: Seen) -> int:
        """Blocks far from the median of their launch, as the other rounds go."""
        import numpy as np

        if seen.rounds - seen.launches < ENOUGH_FOR_OUTLIERS:
            return 0
        launches = defaultdict(list)
        for (launch, _), value in self.rounds[stage, 0, point].items():
            launches[launch].append(value)
        far = OUTLIER * float(seen.noise[0]) + 1e-9  # equal times differ by rounding alone
        return sum(int(np.sum(np.abs(np.array(v) - np.median(v)) > far)) for v in launches.values())

    def ratios(self, pairs: Sequence[_Pair], *, margin: float, alpha: float) -> dict[_Pair, SpeedRatio]:
        """Every pair that has two rounds in common, corrected together."""
        import numpy as np

        found = {pair: value for pair in pairs if (value := self._estimate(pair)) is not None}
        if not found:
            return {}
        again = [self._to_baseline[pair.point].get(None) for pair in found]
        # where the noise is not known, nothing is claimed
        floors = [np.array([np.inf]) if a is None else noise_floor(a) for a in again]
        claims, level = verdicts(list(found.values()), floors, margin=margin, alpha=alpha)
        ratios = {}
        for (pair, value), same, floor, claim in zip(found.items(), again, floors, claims, strict=True):
            interval = _interval(value)
            ratios[pair] = SpeedRatio(
                ratio=interval.median,
                low=interval.low,
                high=interval.high,
                verdict=CLAIMS[int(claim[0])],
                inside_floor=same is not None
                and math.log(interval.low) <= floor[0]
                and math.log(interval.high) >= -floor[0],
                rounds_to_decide=rounds_to_decide(
                    value, same, rounds=len(self._common(pair)), margin=margin, alpha=float(level[0])
                )
                if same is not None and not claim[0]
                else None,
            )
        return ratios

    def noise_floors(self) -> Iterator[NoiseFloor]:
        for point in self.points:
            if (again := self._to_baseline[point].get(None)) is not None:
                interval = _interval(again)
                yield NoiseFloor(**point.model_dump(), ratio_low=interval.low, ratio_high=interval.high)

    def interval(self, pair: _Pair) -> Interval | None:
        """95 %, of this pair alone; None where no two rounds have both."""
        found = self._estimate(pair)
        return None if found is None else _interval(found)

    def _estimate(self, pair: _Pair) -> Estimate | None:
        if pair.other == self.baseline:
            return self._to_baseline[pair.point].get(pair.stage)
        seen = _look_at(self._common(pair))
        return None if seen is None else estimate(seen, list(self._seen_to_baseline[pair.point].values()))

    def _common(self, pair: _Pair) -> Rounds:
        return _ratios(*(self.rounds.get((stage, 0, pair.point), {}) for stage in (pair.stage, pair.other)))

    @cached_property
    def _seen_to_baseline(self) -> dict[Point, dict[str | None, Seen]]:
        """What the rounds say of every stage against the baseline; under None its second process."""
        found: dict[Point, dict[str | None, Seen]] = {}
        for point in self.points:
            base = self.rounds.get((self.baseline, 0, point), {})
            others: dict[str | None, Rounds] = {
                stage: self.rounds.get((stage, 0, point), {}) for stage in self.stages if stage != self.baseline
            }
            others[None] = self.rounds.get((self.baseline, 1, point), {})
            seen = {stage: _look_at(_ratios(rounds, base)) for stage, rounds in others.items()}
            found[point] = {stage: value for stage, value in seen.items() if value is not None}
        return found

    @cached_property
    def _to_baseline(self) -> dict[Point, dict[str | None, Estimate]]:
        return {
            point: dict(zip(seen, estimates(list(seen.values())), strict=True))
            for point, seen in self._seen_to_baseline.items()
        }


def _ratios(stage: Rounds, other: Rounds) -> Rounds:
    """log(speed of `stage` / speed of `other`) in the rounds that both have."""
    return {at: other[at] - value for at, value in stage.items() if at in other}


def _look_at(rounds: Rounds) -> Seen | None:
    """None below two rounds."""
    import numpy as np

    if len(rounds) < 2:
        return None
    values: np.ndarray = np.array([list(rounds.values())])
    return look_at(values, np.array([launch for launch, _ in rounds]))


def _interval(value: Estimate) -> Interval:
    center, half = float(value.center[0]), float(value.half_width()[0])
    return Interval(median=math.exp(center), low=_exp(center - half), high=_exp(center + half))


def _exp(logarithm: float) -> float:
    """Finite and positive: an interval of two wildly different rounds has no end that a float could hold."""
    return math.exp(min(max(logarithm, -700.0), 700.0))


def _level(plan: LookPlan | None, looks_taken: int | None) -> tuple[float, float]:
    """(margin, probability of any error that the last look taken may spend)."""
    if plan is None:
        return MARGIN, ALPHA
    taken = len(plan.looks) if looks_taken is None else min(max(looks_taken, 1), len(plan.looks))
    return plan.margin, plan.looks[taken - 1].alpha
