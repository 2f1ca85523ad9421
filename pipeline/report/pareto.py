"""The Pareto front of speed and quality: the stages that no other was shown to beat."""

from __future__ import annotations

from typing import NamedTuple

from pipeline.report.break_even import deciding_point
from pipeline.report.points import is_faster
from pipeline.report.schema import PlainRatio, Report, Speed, StageReport
from pipeline.report.verdicts import is_contradicted, is_idle
from pipeline.report.words import has_random_weights, is_broken

ALIKE = 5e-4
"""Models whose quality differs by less are told apart by their speed alone."""


class _Span(NamedTuple):
    low: float
    high: float


class _Standing(NamedTuple):
    stage: StageReport
    point: Speed
    loss: _Span


def pareto(report: Report) -> tuple[str, ...]:
    """Stages that no other was shown to beat: to be faster without worse predictions, or better without being slower.

    Shown is what intervals show: of the two stages' ratio in the rounds that both ran in, and of their losses, if these
    do not overlap. Speed is that of decode at its first workload point, or where nothing is decoded, of the first whole
    pass. Quality is perplexity; for random weights, whose perplexity means nothing, the divergence from the baseline.
    What is broken is never among them, nor what changed nothing: it is the model that it was made from.
    """
    points = {stage.name: deciding_point(stage) for stage in report.stages}
    standing: list[_Standing] = []
    for stage in report.stages:
        point, loss = points[stage.name], loss_of(stage, report)
        if point is None or loss is None or loss.ratio is None or is_broken(stage):
            continue
        if is_contradicted(stage, point, report) or (is_idle(stage) and points.get(str(stage.parent)) is not None):
            continue
        standing.append(_Standing(stage, point, _loss_span(loss)))
    return tuple(mine.stage.name for mine in standing if not any(_beats(other, mine, report) for other in standing))


def _beats(one: _Standing, other: _Standing, report: Report) -> bool:
    """Shown to be better in one, and not shown to be worse in the other."""
    if one is other:
        return False
    better, worse = one.loss.high < other.loss.low, one.loss.low > other.loss.high
    return (not worse and is_faster(one.stage, other.stage, one.point, report)) or (
        better and not is_faster(other.stage, one.stage, one.point, report)
    )


def loss_of(stage: StageReport, report: Report) -> PlainRatio | None:
    """How much worse than the baseline's a stage's predictions are; for random weights, by agreement alone."""
    if stage.name == report.baseline:
        return PlainRatio(ratio=1.0, low=None, high=None)
    paired = stage.quality.vs_baseline if stage.quality else None
    if paired is None:
        return None
    if has_random_weights(report):
        return None if paired.kl_divergence is None else PlainRatio(ratio=1 + paired.kl_divergence, low=None, high=None)
    return paired.perplexity_ratio if paired.perplexity_ratio.ratio else None


def _loss_span(loss: PlainRatio) -> _Span:
    ratio = loss.ratio or 1.0
    low, high = loss.low if loss.low is not None else ratio, loss.high if loss.high is not None else ratio
    return _Span(low - ALIKE / 2, high + ALIKE / 2)
