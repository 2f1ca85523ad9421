"""Speed ratios of any two stages that ran in the same rounds, as a report holds them."""

from __future__ import annotations

from pipeline.measure.looks import LookPlan
from pipeline.measure.samples import SpeedMeasurement
from pipeline.measure.statistics import compare_stages
from pipeline.report.schema import PairedSpeed, Ratio


def paired_speed(
    measured: SpeedMeasurement, stage: str, other: str, *, comparisons: int, again: str | None = None
) -> tuple[PairedSpeed, ...]:
    """Speed of `stage` over that of `other` at every workload point at which both ran in two rounds or more.

    `comparisons` is the number of such pairs that are shown together. `again` is the stage whose second process shows
    the noise; default: the baseline.
    """
    plan = LookPlan.declare(measured.looks, measured.margin) if measured.looks else None
    found = compare_stages(
        measured.samples,
        stage,
        other,
        baseline=again or measured.baseline,
        plan=plan,
        looks_taken=measured.looks_taken or None,
        comparisons=max(1, comparisons),
    )
    return tuple(
        PairedSpeed(
            kind=point.kind,
            batch=point.batch,
            prompt=point.prompt,
            new_tokens=point.new_tokens or None,
            ratio=Ratio.model_validate(ratio.model_dump()),
        )
        for point, ratio in found.items()
    )
