"""The Pareto front of speed and quality: the stages that no other was shown to beat."""

from __future__ import annotations

from typing import NamedTuple

from pipeline.report.break_even import deciding_point
from pipeline.report.schema import PlainRatio, Report, Speed, StageReport
from pipeline.report.verdicts import is_contradicted, is_idle
from pipeline.report.words import has_random_weights, is_broken

ALIKE = 5e-4
"""Models whose quality differs by less are told apart by their speed alone."""


class _Span(NamedTuple):
    low: float
    high: float


class _Standing(NamedTuple):
    speed: _Span
    loss: _Span

    def beats(self, other: _Standing) -> bool:
        """Shown to be better in one, and not shown to be worse in the other."""
        faster, slower = self.speed.low > other.speed.high, self.speed.high < other.speed.low
        better, worse = self.loss.high < other.loss.low, self.loss.low > other.loss.high
        return (faster and not worse) or (better and not slower)


def pareto(report: Report) -> tuple[str, ...]:
    """Stages that no other was shown to beat: to be faster without worse predictions, or better without being slower.

    Shown is what intervals that do not overlap show. Speed is that of decode at its first workload point, or where
    nothing is decoded, of the first whole pass. Quality is perplexity; for random weights, whose perplexity means
    nothing, the divergence from the baseline. What is broken is never among them, nor what changed nothing: it is the
    model that it was made from.
    """
    points = {stage.name: deciding_point(stage) for stage in report.stages}
    timed = [(stage, point) for stage in report.stages if (point := points[stage.name]) is not None]
    paired = all(point.vs_baseline is not None or stage.name == report.baseline for stage, point in timed)
    standings = {}
    for stage, point in timed:
        loss = loss_of(stage, report)
        if loss is None or loss.ratio is None or is_broken(stage):
            continue
        if is_contradicted(stage, point, report) or (is_idle(stage) and points.get(str(stage.parent)) is not None):
            continue
        standings[stage.name] = _Standing(_speed(point, paired=paired), _loss_span(loss))
    return tuple(
        name for name, standing in standings.items() if not any(other.beats(standing) for other in standings.values())
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


def _speed(point: Speed, *, paired: bool) -> _Span:
    """Against the baseline, in the same rounds; absolute where there is no baseline to be held against."""
    if not paired:
        return _Span(point.tokens_per_s.low, point.tokens_per_s.high)
    ratio = point.vs_baseline
    return _Span(1.0, 1.0) if ratio is None else _Span(ratio.low, ratio.high)


def _loss_span(loss: PlainRatio) -> _Span:
    ratio = loss.ratio or 1.0
    low, high = loss.low if loss.low is not None else ratio, loss.high if loss.high is not None else ratio
    return _Span(low - ALIKE / 2, high + ALIKE / 2)
