"""Speed ratios of any two stages that ran in the same rounds, as a report holds them."""

from __future__ import annotations

from pipeline.measure.samples import SpeedMeasurement
from pipeline.measure.statistics import SpeedRatio, compare_stages, contrasts
from pipeline.report.schema import Contrast, PairedSpeed, Ratio


def paired_speed(
    measured: SpeedMeasurement, stage: str, other: str, *, comparisons: int, again: str | None = None
) -> tuple[PairedSpeed, ...]:
    """Speed of `stage` over that of `other` at every workload point at which both ran in two rounds or more.

    Nothing is claimed where the budget did not hold even the least number of rounds.

    `comparisons` is the number of such pairs that are shown together. `again` is the stage whose second process shows
    the noise; default: the baseline.
    """
    found = compare_stages(
        measured.samples,
        stage,
        other,
        baseline=again or measured.baseline,
        plan=measured.plan,
        looks_taken=measured.looks_taken,
        comparisons=max(1, comparisons),
    )
    return tuple(
        PairedSpeed(
            kind=point.kind,
            batch=point.batch,
            prompt=point.prompt,
            new_tokens=point.new_tokens or None,
            ratio=_claimed(ratio, fits=measured.fits),
        )
        for point, ratio in found.items()
    )


def every_contrast(measured: SpeedMeasurement) -> tuple[Contrast, ...]:
    """Every two stages but the baseline, at the first workload point of each kind."""
    points = {sample.point.kind: sample.point for sample in reversed(measured.samples)}
    found = contrasts(measured.samples, baseline=measured.baseline, points=list(points.values()))
    return tuple(
        Contrast(
            **pair.model_dump(exclude={"point"}),
            **{**pair.point.model_dump(), "new_tokens": pair.point.new_tokens or None},
        )
        for pair in found
    )


def _claimed(ratio: SpeedRatio, *, fits: bool) -> Ratio:
    changes = {} if fits else {"verdict": "inconclusive"}
    return Ratio.model_validate({**ratio.model_dump(), **changes})
