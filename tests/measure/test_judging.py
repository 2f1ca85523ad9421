from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.measure.judging import Judgement, judge
from pipeline.measure.quality import QualityFigures, RatioInterval
from pipeline.recipe.schema import Thresholds


def ratio(middle: float, high: float, low: float | None = None) -> RatioInterval:
    return RatioInterval(ratio=middle, low=middle if low is None else low, high=high)


def judged(
    interval: RatioInterval,
    divergence: float | None,
    agreement: float | None,
    *,
    identical: bool = False,
    random_weights: bool = False,
    **thresholds: float,
) -> Judgement:
    figures = QualityFigures(
        perplexity_ratio=interval,
        kl_divergence=divergence,
        top1_agreement=agreement,
        max_abs_logit_error=0.0,
        first_divergence=None,
        identical=identical,
    )
    return judge(figures, Thresholds.model_validate(thresholds), random_weights=random_weights)


NOT_FINITE = RatioInterval(ratio=None, low=None, high=None)


@pytest.mark.parametrize(
    ("figures", "verdict"),
    [
        ((ratio(1.0, 1.0), 0.0, 1.0, True), "identical"),
        ((ratio(1.0, 1.0), 1e-6, 1.0, False), "equivalent"),
        ((ratio(1.0, 1.02), 1e-6, 1.0, False), "degraded"),
        ((ratio(1.0, 1.0), 0.05, 0.9, False), "degraded"),
        ((ratio(0.9, 0.9), 0.05, 0.9, False), "degraded"),
        ((ratio(0.9, 0.9), 1e-6, 1.0, False), "degraded"),
        ((ratio(1.0, 1.0, 0.98), 1e-6, 1.0, False), "degraded"),
        ((ratio(1.0, 1.01, 1 / 1.01), 0.01, 1.0, False), "equivalent"),
        ((ratio(2.0, 2.5), 0.9, 0.8, False), "degraded"),
        ((ratio(2.1, 2.2), 0.9, 0.8, False), "broken"),
        ((ratio(1.0, 1.0), 0.5, 0.3, False), "broken"),
        ((ratio(1.0, 1.0), 0.005, 0.3, False), "equivalent"),
        ((NOT_FINITE, 0.0, 1.0, False), "broken"),
        ((ratio(1.0, 1.0), None, 1.0, False), "broken"),
    ],
)
def test_the_verdict_follows_the_default_thresholds(figures: tuple[Any, ...], verdict: str) -> None:
    interval, divergence, agreement, identical = figures
    assert judged(interval, divergence, agreement, identical=identical).verdict == verdict


@pytest.mark.parametrize(
    ("found", "thresholds", "verdict"),
    [
        ((ratio(1.5, 1.6), 0.05, 0.9), {"broken_perplexity_ratio": 1.4}, "broken"),
        ((ratio(2.5, 2.6), 0.05, 0.9), {"broken_perplexity_ratio": 3.0}, "degraded"),
        ((ratio(1.02, 1.03), 0.05, 0.9), {"equivalent_perplexity_ratio": 1.05}, "degraded"),
        (
            (ratio(1.02, 1.03), 0.05, 0.9),
            {"equivalent_perplexity_ratio": 1.05, "equivalent_kl_divergence": 0.1},
            "equivalent",
        ),
        ((ratio(1.0, 1.0), 0.05, 0.6), {"broken_top1_agreement": 0.7}, "degraded"),
        ((ratio(1.0, 1.0), 0.05, 0.6), {"broken_top1_agreement": 0.7, "broken_kl_divergence": 0.01}, "broken"),
    ],
)
def test_a_recipes_thresholds_decide(found: tuple[Any, ...], thresholds: dict[str, float], verdict: str) -> None:
    assert judged(*found, **thresholds).verdict == verdict


@pytest.mark.parametrize(("agreement", "verdict"), [(0.2, "broken"), (0.5, "degraded"), (0.95, "equivalent")])
def test_thresholds_of_random_weights_are_their_own(agreement: float, verdict: str) -> None:
    own = {"broken_random_agreement": 0.3, "equivalent_random_agreement": 0.9}
    assert judged(ratio(3.0, 3.0), 0.001, agreement, random_weights=True, **own).verdict == verdict


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        ((ratio(2.345, 2.4), 0.9, 0.8), "perplexity 2.345 times the baseline's: beyond 2"),
        ((ratio(1.034, 1.05, 1.02), 0.001, 0.9), "perplexity 1.034 times the baseline's: beyond 1.01"),
        (
            (ratio(1.004, 1.0154, 0.999), 0.001, 0.9),
            "perplexity 1.0040 times the baseline's: its interval reaches 1.015, beyond 1.01",
        ),
        ((ratio(0.95, 0.96, 0.94), 0.001, 0.9), "perplexity 0.950 times the baseline's: beyond 0.9901"),
        ((ratio(1.0, 1.0), 0.022, 0.9), "KL divergence 0.022 nats: beyond 0.01"),
        (
            (ratio(1.2, 1.3, 1.1), 0.5, 0.3),
            "the most likely token is the baseline's in 30.0% of places: below 50%; KL divergence 0.5 nats: beyond 0.1",
        ),
        ((NOT_FINITE, None, None), "a prediction is not finite"),
    ],
)
def test_the_reason_names_the_figure_and_the_threshold_that_decided(found: tuple[Any, ...], reason: str) -> None:
    assert judged(*found).reason == reason


def test_every_reason_to_be_degraded_is_named() -> None:
    assert judged(ratio(1.1, 1.1), 0.02, 0.9).reason.count("beyond") == 2


@given(st.floats(0.5, 3), st.floats(0, 0.3), st.floats(0, 1), st.floats(0, 1), st.floats(1.001, 1.5))
def test_a_wider_threshold_never_makes_a_verdict_worse(
    middle: float, half: float, divergence: float, agreement: float, limit: float
) -> None:
    order = ["identical", "equivalent", "degraded", "broken"]
    interval = RatioInterval(ratio=middle, low=middle - half, high=middle + half)
    narrow = judged(interval, divergence, agreement, equivalent_perplexity_ratio=limit)
    wide = judged(interval, divergence, agreement, equivalent_perplexity_ratio=limit * 1.1)
    assert order.index(wide.verdict) <= order.index(narrow.verdict)
