"""What a recipe's thresholds make of a stage's predictions: identical, equivalent, degraded or broken, and why."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.artifact import Frozen
from pipeline.measure.quality import QualityFigures
from pipeline.recipe.schema import Thresholds

QualityVerdict = Literal["identical", "equivalent", "degraded", "broken"]


class Judgement(Frozen):
    """What a recipe's thresholds make of the figures."""

    verdict: QualityVerdict
    reason: str = Field(description="the figure and the threshold that decided")


def judge(figures: QualityFigures, thresholds: Thresholds, *, random_weights: bool = False) -> Judgement:
    """What the figures say by these thresholds, and which of them decided.

    broken: a figure is not finite, the perplexity ratio exceeds its threshold, or the most likely tokens agree too
    seldom while the divergence is beyond its threshold, too: a stage that predicts other tokens than a baseline which
    hardly prefers any is not broken by that alone. identical: bit for bit. equivalent: the interval of the perplexity
    ratio lies within its threshold and the inverse of that, and the divergence is within its own. degraded: anything
    else.

    With random weights predictions are nearly uniform: a wrong stage has nearly the baseline's perplexity and diverges
    little from it. Which token comes first is all that it does not get right, so the agreement decides.
    """
    ratio, kl, top1 = figures.perplexity_ratio, figures.kl_divergence, figures.top1_agreement
    if ratio.ratio is None or ratio.low is None or ratio.high is None or kl is None or top1 is None:
        return Judgement(verdict="broken", reason="a prediction is not finite")
    broken = _why_broken(ratio.ratio, kl, top1, thresholds, random_weights)
    if broken is not None:
        return Judgement(verdict="broken", reason=broken)
    if figures.identical:
        return Judgement(verdict="identical", reason="every prediction is the baseline's, bit for bit")
    limit = thresholds.equivalent_perplexity_ratio
    lacking: list[str] = []
    within: list[str] = []
    if random_weights:
        least = thresholds.equivalent_random_agreement
        agreement = f"the most likely token is the baseline's in {_share(top1)} of places"
        (within if top1 >= least else lacking).append(
            f"{agreement}: {'at least' if top1 >= least else 'below'} {least:.0%}"
        )
    else:
        figure = f"perplexity {_shown(ratio.ratio)} times the baseline's"
        if 1 / limit <= ratio.low and ratio.high <= limit:
            within.append(
                f"{figure} ({_shown(ratio.low)} to {_shown(ratio.high)}): within {1 / limit:.4g} to {limit:g}"
            )
        else:
            end, bound = (ratio.high, limit) if ratio.high > limit else (ratio.low, 1 / limit)
            wholly = ratio.low > limit or ratio.high < 1 / limit
            reach = "beyond" if wholly else f"its interval reaches {_shown(end)}, beyond"
            lacking.append(f"{figure}: {reach} {bound:.4g}")
    close = kl <= thresholds.equivalent_kl_divergence
    divergence = f"KL divergence {kl:.2g} nats: {'at most' if close else 'beyond'}"
    (within if close else lacking).append(f"{divergence} {thresholds.equivalent_kl_divergence:g}")
    if lacking:
        return Judgement(verdict="degraded", reason="; ".join(lacking))
    return Judgement(verdict="equivalent", reason="; ".join(within))


def _why_broken(ratio: float, kl: float, top1: float, thresholds: Thresholds, random_weights: bool) -> str | None:
    """The figure that says so; None where none does."""
    agreement = f"the most likely token is the baseline's in {_share(top1)} of places"
    if random_weights:
        least = thresholds.broken_random_agreement
        return f"{agreement}: below {least:.0%}" if top1 < least else None
    if ratio > thresholds.broken_perplexity_ratio:
        return f"perplexity {_shown(ratio)} times the baseline's: beyond {thresholds.broken_perplexity_ratio:g}"
    if top1 < thresholds.broken_top1_agreement and kl > thresholds.broken_kl_divergence:
        return (
            f"{agreement}: below {thresholds.broken_top1_agreement:.0%}; "
            f"KL divergence {kl:.2g} nats: beyond {thresholds.broken_kl_divergence:g}"
        )
    return None


def _shown(ratio: float) -> str:
    """Digits enough to tell it from 1."""
    return f"{ratio:.4f}" if abs(ratio - 1) < 0.01 else f"{ratio:.3f}" if ratio < 100 else f"{ratio:,.0f}"


def _share(value: float) -> str:
    return f"{value:.1%}" if value < 0.995 or value == 1.0 else f"{value:.3%}"
