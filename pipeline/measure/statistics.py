"""From raw samples to figures with intervals, and to what may be claimed.

The unit is the logarithm of a block's time, or of the ratio of two blocks of the same round. Blocks of one launch
share what its processes happened to get (allocation layout, huge pages), so they are not independent: the standard
error comes from a hierarchical bootstrap, launches resampled first and rounds inside them (Davison and Hinkley, 1997,
section 3.8). With three launches the percentiles of such a bootstrap cover too little; in simulations with normal and
with heavy-tailed noise the interval closest to 95 % was Student's t around the median, with Satterthwaite's degrees of
freedom from the variances between and within launches. With one launch nothing is known of what differs between
launches, and the interval does not cover it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from pydantic import Field

from pipeline.artifact import Frozen
from pipeline.measure.looks import MARGIN, LookPlan
from pipeline.measure.samples import Sample
from pipeline.measure.workload import Kind, Point

if TYPE_CHECKING:
    import numpy as np

Verdict = Literal["faster", "slower", "equivalent", "inconclusive"]

CONFIDENCE = 0.95
RESAMPLES = 2000
MEDIAN_VARIANCE = math.pi / 2
"""Variance of a median over that of a mean, for normal values."""


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
        default=None, description="None for the baseline, and where no round has both"
    )
    vs_parent: SpeedRatio | None = None


class NoiseFloor(Frozen):
    """Interval of the ratio of two processes of the baseline at one point."""

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
    rounds_to_decide: int | None = Field(default=None, description="in all; None where decided, or no number would")


class Decisions(Frozen):
    """What a look found."""

    look: int = Field(description="which, from 1")
    comparisons: tuple[Decision, ...]

    @property
    def all_decided(self) -> bool:
        """Whether every comparison has a verdict: then nothing more needs to be measured."""
        return all(c.verdict != "inconclusive" for c in self.comparisons)

    @property
    def rounds_to_decide(self) -> int | None:
        """Rounds in all that would decide every comparison that any number would decide; None where there is none."""
        return max((c.rounds_to_decide for c in self.comparisons if c.rounds_to_decide is not None), default=None)


class _Estimate(NamedTuple):
    center: float
    low: float
    high: float


Grouped = Mapping[int, Sequence[float]]
"""Values by launch."""


def speed_figures(
    samples: Iterable[Sample],
    *,
    baseline: str,
    parents: Mapping[str, str | None],
    plan: LookPlan | None = None,
    looks_taken: int | None = None,
) -> SpeedFigures:
    """Figures of every stage at every point, in the order in which `parents` names the stages.

    A point at which a stage has fewer than two rounds has no figure. A ratio takes the rounds that both stages have.
    """
    margin = MARGIN if plan is None else plan.margin
    blocks: dict[tuple[str, int], dict[Point, dict[tuple[int, int], float]]] = defaultdict(lambda: defaultdict(dict))
    points: dict[Point, None] = {}
    for sample in samples:
        blocks[sample.stage, sample.replica][sample.point][sample.launch, sample.round] = math.log(sample.latency_s)
        points[sample.point] = None
    floors: dict[Point, tuple[float, float]] = {}
    for point in points:
        ratio = _ratio(blocks[baseline, 0][point], blocks[baseline, 1][point])
        if ratio is not None:
            floors[point] = math.exp(ratio.low), math.exp(ratio.high)

    def compare(stage: str, other: str | None, point: Point) -> SpeedRatio | None:
        if other is None or other == stage:
            return None
        found = _ratio(blocks[stage, 0][point], blocks[other, 0][point])
        if found is None:
            return None
        ratio, low, high = map(math.exp, found)
        # where the noise is not known, nothing is claimed
        says = verdict(low, high, margin=margin, floor=floors[point]) if point in floors else "inconclusive"
        return SpeedRatio(ratio=ratio, low=low, high=high, verdict=says)

    stages = {}
    for stage, parent in parents.items():
        figures = []
        for point in points:
            seen = blocks[stage, 0][point]
            latency = _estimate(_by_launch(seen))
            if latency is None:
                continue
            center, low, high = map(math.exp, latency)
            tokens = point.tokens_per_iteration
            figures.append(
                SpeedPoint(
                    **point.model_dump(),
                    rounds=len(seen),
                    launches=len({launch for launch, _ in seen}),
                    tokens_per_s=Interval(median=tokens / center, low=tokens / high, high=tokens / low),
                    latency_s=Interval(median=center, low=low, high=high),
                    vs_baseline=compare(stage, baseline, point),
                    vs_parent=compare(stage, parent, point),
                )
            )
        stages[stage] = tuple(figures)
    return SpeedFigures(
        stages=stages,
        noise_floor=tuple(
            NoiseFloor(**point.model_dump(), ratio_low=low, ratio_high=high) for point, (low, high) in floors.items()
        ),
    )


def decide(
    samples: Iterable[Sample], *, baseline: str, parents: Mapping[str, str | None], plan: LookPlan, look: int
) -> Decisions:
    """The verdict of every stage at every point against the baseline at the `look`-th look (from 1)."""
    found = speed_figures(samples, baseline=baseline, parents=parents, plan=plan, looks_taken=look)
    return Decisions(
        look=look,
        comparisons=tuple(
            Decision(
                stage=stage,
                point=Point(kind=p.kind, batch=p.batch, prompt=p.prompt, new_tokens=p.new_tokens),
                verdict=p.vs_baseline.verdict,
                rounds_to_decide=p.vs_baseline.rounds_to_decide,
            )
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

    `baseline` names the stage whose second process shows the noise. `comparisons` is the number of such pairs that one
    table shows (stages, not points): they are corrected together.
    """
    found = speed_figures(
        samples, baseline=baseline, parents={other: None, stage: other}, plan=plan, looks_taken=looks_taken
    )
    return {
        Point(kind=p.kind, batch=p.batch, prompt=p.prompt, new_tokens=p.new_tokens): p.vs_parent
        for p in found.stages[stage]
        if p.vs_parent is not None
    }


def verdict(low: float, high: float, *, margin: float = MARGIN, floor: tuple[float, float] = (1.0, 1.0)) -> Verdict:
    """What the interval [low, high] of a speed ratio allows to claim.

    `faster` and `slower` where it lies wholly beyond the margin and beyond the noise floor; `equivalent` where it, and
    the noise floor too, lies wholly inside the margin; else `inconclusive`. The floor is taken as symmetric: two equal
    processes that differed by 3 % in one direction might as well in the other.
    """
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


def ratio_interval(stage: Grouped, other: Grouped) -> tuple[float, float, float] | None:
    """(ratio, low, high) of the speeds of two stages from seconds by launch, round by round; None below two rounds.

    Raises: ValueError where the launches or rounds of the two differ.
    """
    if {k: len(v) for k, v in stage.items()} != {k: len(v) for k, v in other.items()}:
        raise ValueError("the stages have different rounds")
    logs = {
        launch: [math.log(b) - math.log(a) for a, b in zip(stage[launch], other[launch], strict=True)]
        for launch in stage
    }
    found = _estimate(logs)
    return None if found is None else (math.exp(found.center), math.exp(found.low), math.exp(found.high))


def _ratio(stage: Mapping[tuple[int, int], float], other: Mapping[tuple[int, int], float]) -> _Estimate | None:
    """Of log(speed of stage / speed of other) over the rounds that both have."""
    return _estimate(_by_launch({at: other[at] - stage[at] for at in stage.keys() & other.keys()}))


def _by_launch(values: Mapping[tuple[int, int], float]) -> dict[int, list[float]]:
    found: dict[int, list[float]] = defaultdict(list)
    for (launch, _), value in values.items():
        found[launch].append(value)
    return found


def _estimate(groups: Grouped) -> _Estimate | None:
    """Median of all values and its 95 % interval; None below two values.

    Neither the order of rounds nor that of launches changes it, and negated values give the negated interval.
    """
    import numpy as np
    from scipy import stats

    launches = sorted((np.sort(np.asarray(v, dtype=np.float64)) for v in groups.values() if len(v)), key=_place)
    count = sum(map(len, launches))
    if count < 2:
        return None
    center = float(np.median(np.concatenate(launches)))
    medians = np.array([np.median(launch) for launch in launches])
    within_df = count - len(launches)
    squares = sum(float(np.sum((launch - median) ** 2)) for launch, median in zip(launches, medians, strict=True))
    between = float(medians.var(ddof=1)) / len(launches) if len(launches) > 1 else 0.0
    within = MEDIAN_VARIANCE * squares / within_df / count if within_df else 0.0
    variance = max(_bootstrap_variance(launches), between, within)
    if variance == 0.0:
        return _Estimate(center, center, center)
    share = max(variance - within, 0.0)  # what launches add
    spread = (share**2 / (len(launches) - 1) if len(launches) > 1 else 0.0) + (
        within**2 / within_df if within_df else 0.0
    )
    freedom = variance**2 / spread if spread > 0 else float(count - 1)
    freedom = min(max(freedom, 1.0), float(count - 1))
    half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, freedom)) * math.sqrt(variance)
    return _Estimate(center, center - half, center + half)


def _place(launch: np.ndarray) -> tuple[float, float]:
    import numpy as np

    return float(np.median(launch)), float(launch.mean())


def _bootstrap_variance(launches: Sequence[np.ndarray]) -> float:
    """Variance of the median when launches are resampled first, then rounds inside each.

    Every draw is used with its mirror image, from the other end of the sorted values, so that the result is the same
    for negated values. The seed is fixed.
    """
    import numpy as np

    draw = np.random.default_rng(0)
    lengths = np.array([len(launch) for launch in launches])
    padded = np.zeros((len(launches), lengths.max()))
    for row, launch in enumerate(launches):
        padded[row, : len(launch)] = launch
    half = RESAMPLES // 2
    chosen = draw.integers(0, len(launches), (half, len(launches)))
    fractions = draw.random((half, len(launches), lengths.max()))
    medians = []
    for mirrored in (False, True):
        picked = len(launches) - 1 - chosen if mirrored else chosen
        size = lengths[picked][:, :, None]
        index = np.minimum((fractions * size).astype(np.int64), size - 1)
        index = size - 1 - index if mirrored else index
        values = padded[picked[:, :, None], index]
        # a launch with fewer rounds gives as many values as it has
        drawn = np.where(np.arange(lengths.max()) < size, values, np.nan)
        medians.append(np.nanmedian(drawn.reshape(half, -1), axis=1))
    return float(np.concatenate(medians).var())
