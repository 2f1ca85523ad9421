"""What a verdict on speed is worth: its reason, the noise floor below it, and what speaks against it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pipeline.report.figures import MARGIN, floor_share, noise_floor_in_words
from pipeline.report.schema import Contribution, PairedSpeed, Ratio, Report, Schedule, Speed, StageReport

ENDINGS = {
    "decided": "because all was decided",
    "looks": "with the last look",
    "budget": "because the budget was used up",
    "failed": "because nothing was left to compare",
}

MANY_ROUNDS = 1000
"""How many more than this would decide is a figure without use: nobody waits for them."""

RATIO_NOTE = (
    "A ratio is the median of the ratios within each round, in which both took turns; the medians of "
    "tokens/s are taken over all rounds, fast and slow minutes of the machine alike, so their quotient differs from it."
)
"""Why 2.02 × is not the one column divided by the other."""


def margin_of(report: Report) -> float:
    """The share within which two speeds are equivalent."""
    return report.schedule.margin if report.schedule else MARGIN


def noise_floor(point: Speed | PairedSpeed, report: Report) -> float | None:
    """The noise floor at a workload point, as a share."""
    floor = report.floor_at(point)
    return None if floor is None else floor_share(floor.ratio_low, floor.ratio_high)


def is_idle(stage: StageReport) -> bool:
    """Whether the stage changed nothing: neither graph nor weights nor how it is executed."""
    return stage.effect is not None and stage.effect.kind == "none"


def over_parent(stage: StageReport, point: Speed, report: Report) -> Ratio | None:
    """The stage's speed over that of the stage that it was made from."""
    return point.vs_parent or (point.vs_baseline if stage.parent == report.baseline else None)


def is_contradicted(stage: StageReport, point: Speed, report: Report) -> bool:
    """Whether the stage was found faster or slower than its parent although it changed nothing."""
    ratio = over_parent(stage, point, report)
    return is_idle(stage) and ratio is not None and ratio.verdict in {"faster", "slower"}


def contradicts(found: Contribution, point: PairedSpeed) -> bool:
    """Whether a chain was timed faster or slower than the chain without a pass although both are one artifact."""
    return found.same_artifact and point.ratio.verdict in {"faster", "slower"}


def why_undecided(ratio: Ratio, point: Speed | PairedSpeed, report: Report) -> str:
    """What keeps an inconclusive ratio from a verdict; empty where nothing more is known than its interval."""
    if ratio.verdict != "inconclusive":
        return ""
    rounds = rounds_in_words(ratio)
    return ", ".join(filter(None, (_obstacle(ratio, point, report), rounds and f"{rounds} rounds may decide")))


def undecided_in_words(points: Sequence[tuple[str, Speed]], report: Report) -> list[str]:
    """What keeps the inconclusive stages at one workload point from a verdict: a line for each reason.

    Args:
        points: name and speed of every stage at the point.
    """
    by_reason: dict[str, list[str]] = {}
    unit = " rounds may decide"  # told once
    for name, point in points:
        ratio = point.vs_baseline
        if ratio is None or ratio.verdict != "inconclusive":
            continue
        reason, rounds = _obstacle(ratio, point, report), rounds_in_words(ratio)
        if rounds:
            by_reason.setdefault(reason, []).append(f"{name} ({rounds}{unit})")
            unit = ""
        elif reason:
            by_reason.setdefault(reason, []).append(name)
    return [
        f"inconclusive{', ' if reason else ''}{reason}: {', '.join(stages)}" for reason, stages in by_reason.items()
    ]


def rounds_in_words(ratio: Ratio) -> str:
    """How many rounds in all would decide an inconclusive ratio: `about 40`. Empty where no number would."""
    if ratio.rounds_to_decide is None:
        return ""
    return f"about {ratio.rounds_to_decide:,}" if ratio.rounds_to_decide <= MANY_ROUNDS else f"over {MANY_ROUNDS:,}"


def _obstacle(ratio: Ratio, point: Speed | PairedSpeed, report: Report) -> str:
    floor = noise_floor(point, report)
    if floor is None:
        return "the noise floor is not known"
    if lies_inside(floor, ratio.low, ratio.high):
        return f"inside {noise_floor_in_words(floor)}"
    if floor > margin_of(report) and _reaches(ratio, floor):  # a lower floor forbids no claim that the margin allows
        return f"reaches into {noise_floor_in_words(floor)}"
    margin = margin_of(report)
    if ratio.low > 1 + margin or ratio.high < 1 / (1 + margin):
        return "shown by its own interval, and not for all comparisons at once"
    return ""


def _reaches(ratio: Ratio, floor: float) -> bool:
    if ratio.inside_floor or ratio.low <= 1 <= ratio.high:
        return True
    return lies_inside(floor, ratio.low) or lies_inside(floor, ratio.high)


def lies_inside(floor: float, *ratios: float) -> bool:
    """Whether all of the ratios are nearer to 1 than the noise floor."""
    return all(r > 0 and abs(math.log(r)) <= math.log1p(floor) for r in ratios)


def outliers_in_words(point: Speed) -> str:
    """`2 of 30 blocks far off`; empty where there is none. They count in every figure."""
    return f"{point.outliers} of {point.rounds} blocks far off" if point.outliers else ""


def counts_in_words(points: Sequence[Speed]) -> str:
    """Rounds and launches of the stages at one workload point: `30 rounds in 6 launches`."""
    rounds, launches = max(p.rounds for p in points), max(p.launches for p in points)
    return f"{_counted(rounds, 'round')} in {_counted(launches, 'launch', 'launches')}"


def schedule_in_words(schedule: Schedule) -> str:
    """How many rounds ran, after which of the planned ones it was looked, and why they ended."""
    looks, taken = schedule.looks, schedule.looks[: schedule.looks_taken]
    ran = f"{_counted(schedule.rounds, 'round')} in {_counted(schedule.launches, 'launch', 'launches')}"
    declared = f"{_listed([f'{n:,}' for n in looks], ', ')} rounds" if looks else ""
    if not taken:
        looked = "never looked whether all is decided" + (f" (planned: after {declared})" if declared else "")
    elif len(taken) == len(looks):
        looked = f"looked after {_listed([f'{n:,}' for n in taken])} rounds, as planned"
    else:
        looked = f"looked after {_listed([f'{n:,}' for n in taken])} of {declared}"
    ended = ENDINGS[schedule.ended]
    if schedule.ended == "budget":
        ended = f"because the budget of {schedule.budget_s:,.4g} s was used up"
    return f"{ran}; {looked}; ended {ended}"


def _counted(count: int, one: str, many: str | None = None) -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def _listed(words: Sequence[str], last: str = " and ") -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + last + words[-1]
