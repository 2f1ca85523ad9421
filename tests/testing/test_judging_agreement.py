"""What figures say against a tolerance."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.measure.quality import QualityFigures, RatioInterval
from pipeline.testing.agreement import Agreement
from pipeline.testing.conformance import judged


def figures(**changes: Any) -> Agreement:
    found: dict[str, Any] = {
        "perplexity_ratio": RatioInterval(ratio=1.0, low=1.0, high=1.0),
        "kl_divergence": 1e-9,
        "top1_agreement": 1.0,
        "max_abs_logit_error": 1e-5,
        "first_divergence": None,
        "identical": False,
        **changes,
    }
    return Agreement(QualityFigures(**found))


@pytest.mark.parametrize(
    ("agreement", "tolerance", "outcome", "told"),
    [
        (figures(), 0.01, "passed", "0.01 is allowed"),
        (figures(max_abs_logit_error=0.02), 0.01, "failed", "a logit differs by 0.02 at most"),
        (figures(max_abs_logit_error=0.02), 0.05, "passed", "0.05 is allowed"),
        (figures(max_abs_logit_error=None), 5.0, "failed", "not finite"),
        (figures(first_divergence=3), 0.01, "failed", "differs from token 3 on: look at the key-value cache"),
        (figures(max_abs_logit_error=0.4, first_divergence=3), 0.5, "passed", "0.5 is allowed"),  # rounding can do that
        (Agreement(None, "its model does not load: no", loads=False), 0.01, "failed", "does not load"),
    ],
)
def test_the_tolerance_decides_and_single_tokens_have_to_follow(
    agreement: Agreement, tolerance: float, outcome: str, told: str
) -> None:
    found = judged(agreement, tolerance)
    assert (found.check, found.outcome) == ("tolerance", outcome)
    assert told in found.message
