"""After how many tokens the time that an optimization took is earned back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from pipeline.report.schema import BreakEven, Report, Speed, StageReport
from pipeline.report.verdicts import is_contradicted


def break_even(stage: StageReport, report: Report, sources: Mapping[str, Sequence[str]]) -> BreakEven | None:
    """None where the stage is not faster than the baseline, or a cost or a speed is not known.

    Nor does a stage earn anything that is broken, or that changed nothing and was timed faster all the same.

    `sources` names the stages that each was made from. The cost is that of the stage and of all that it was made from,
    but for what the baseline needs itself, each as it was when it was made. A token earns the difference between the
    baseline's time and the stage's, by the paired ratio. The ends take the interval of that ratio and of the baseline's
    own time at once, which is wider than either alone asks for.
    """
    point = deciding_point(stage)
    if point is None or point.vs_baseline is None or point.vs_baseline.verdict != "faster":
        return None
    paired = stage.quality.vs_baseline if stage.quality else None
    if is_contradicted(stage, point, report) or (paired is not None and paired.verdict == "broken"):
        return None
    theirs = next((p for p in report.stage(report.baseline).speed or () if p.point == point.point), None)
    cost_s = cost_of(stage.name, report, sources)
    if theirs is None or cost_s is None:
        return None
    ratio, rate = point.vs_baseline, theirs.tokens_per_s

    def tokens(speedup: float, per_s: float) -> int | None:
        saved_s = (1 - 1 / speedup) / per_s if per_s > 0 else 0.0
        return math.ceil(cost_s / saved_s) if saved_s > 0 else None

    return BreakEven(
        cost_s=cost_s,
        tokens=tokens(ratio.ratio, rate.median),
        low=tokens(ratio.high, rate.low),
        high=tokens(ratio.low, rate.high),
        kind=point.kind,
    )


def deciding_point(stage: StageReport) -> Speed | None:
    """The first decode point, or where nothing is decoded, the first whole pass."""
    points = stage.speed or ()
    return next((p for kind in ("decode", "forward") for p in points if p.kind == kind), None)


def cost_of(name: str, report: Report, sources: Mapping[str, Sequence[str]]) -> float | None:
    """Seconds of making a stage beyond what its baseline takes; None where one of them is not recorded."""
    chain = _with_all_behind(name, sources) - _with_all_behind(report.baseline, sources)
    costs = [stage.cost.wall_s for stage in report.stages if stage.name in chain]
    known = [cost for cost in costs if cost is not None]
    return sum(known) if len(known) == len(chain) else None


def _with_all_behind(name: str, sources: Mapping[str, Sequence[str]]) -> set[str]:
    found: set[str] = set()
    waiting = [name]
    while waiting:
        if (stage := waiting.pop()) not in found:
            found.add(stage)
            waiting += sources.get(stage, ())
    return found
