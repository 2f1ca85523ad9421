"""A stage's speed in words: against the baseline and against the stage that it was made from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from pipeline.report.figures import (
    duration,
    duration_interval,
    floor_in_table,
    noise_floor_in_words,
    rate,
    rate_interval,
    times,
    times_interval,
)
from pipeline.report.points import KINDS, apart
from pipeline.report.schema import Ratio, Report, Speed, StageReport
from pipeline.report.verdicts import (
    is_contradicted,
    is_idle,
    lies_inside,
    margin_of,
    noise_floor,
    over_parent,
    why_undecided,
)


class Span(NamedTuple):
    """From the lowest end of several intervals to the highest."""

    low: float
    high: float


def speed_clauses(stage: StageReport, report: Report) -> list[str]:
    """One clause for each kind of work that was timed."""
    if stage.speed is None:
        return [] if stage.status == "unmeasured" else ["its speed was not measured in this run"]
    found = []
    for kind in KINDS:
        points = [p for p in stage.speed if p.kind == kind]
        if not points:
            continue
        if stage.name == report.baseline:
            found.append(_rates(kind, points))
        elif is_idle(stage):
            found.append(_idle(kind, points, stage, report))
        else:
            found.append(_against(kind, points, stage, report))
    return found


def _rates(kind: str, points: Sequence[Speed]) -> str:
    first = points[0]
    if len(points) == 1 and kind == "forward":
        passed = duration_interval(first.latency_s.median, first.latency_s)
        return f"forward {duration(first.latency_s.median)} a pass ({passed})"
    figure = first.tokens_per_s
    if len(points) == 1:
        return f"{kind} {rate(figure.median)} tokens/s ({rate_interval(figure.median, figure)})"
    medians = [p.tokens_per_s.median for p in points]
    return f"{kind} {rate(min(medians))} to {rate(max(medians))} tokens/s at {len(points)} workload points"


def _against(kind: str, points: Sequence[Speed], stage: StageReport, report: Report) -> str:
    """Against the baseline, and the parent where that is another stage."""
    words = _compared(kind, [(p, p.vs_baseline) for p in points], report.baseline, report)
    if stage.parent not in {None, report.baseline}:
        further = [(p, p.vs_parent) for p in points]
        if any(ratio for _, ratio in further):
            # why it is undecided is told of the baseline: once is enough for a sentence
            words += ", and " + _compared("", further, str(stage.parent), report, reasons=False)
    return words


def _compared(
    kind: str, ratios: Sequence[tuple[Speed, Ratio | None]], other: str, report: Report, *, reasons: bool = True
) -> str:
    known = [(p, r) for p, r in ratios if r is not None]
    subject = f"{kind} " if kind else ""
    margin = margin_of(report)
    if not known:
        return f"{subject}was not compared with {other}"
    if len(known) == 1:
        point, ratio = known[0]
        figures = f"{times(ratio.ratio)} ({times_interval(ratio.ratio, ratio, margin)})"
        why = why_undecided(ratio, point, report) if reasons else ""
        said = f"{subject}{'is ' if kind else ''}{_verdict_in_words(ratio.verdict, other)}, {figures}"
        return said + (f": {why}" if why else "")
    only = [r for _, r in known]
    low, high = min(only, key=lambda r: r.ratio), max(only, key=lambda r: r.ratio)
    verdicts = [r.verdict for r in only]
    if len(set(verdicts)) == 1:
        all_of_them = "both" if len(known) == 2 else f"all {len(known)}"
        said = f"{'is ' if kind else ''}{_verdict_in_words(verdicts[0], other)} at {all_of_them} workload points"
    else:
        counts = ", ".join(f"{verdicts.count(v)} {v}" for v in dict.fromkeys(verdicts))
        said = f"against {other} at {len(known)} workload points: {counts}"
    ends = Span(min(r.low for r in only), max(r.high for r in only))
    within = times_interval(low.ratio, ends, margin)
    return f"{subject}{said}, {times(low.ratio)} to {times(high.ratio)} (within {within})"


def _verdict_in_words(verdict: str, other: str) -> str:
    if verdict == "equivalent":
        return f"as fast as {other}"
    return f"inconclusive against {other}" if verdict == "inconclusive" else f"{verdict} than {other}"


def _idle(kind: str, points: Sequence[Speed], stage: StageReport, report: Report) -> str:
    """What was timed of a stage that changed nothing: noise, or a contradiction that nothing in the model explains."""
    pairs = [(r, noise_floor(p, report), p) for p in points if (r := over_parent(stage, p, report)) is not None]
    other = f" against {stage.parent}" if stage.parent != report.baseline else ""
    alone = len({p.kind for p in stage.speed or ()}) == 1
    whose = "its" if alone else f"{kind}'s"
    if not pairs:
        return f"{kind} was not compared with {stage.parent}"
    floors = [floor for ratio, floor, _ in pairs if floor is not None and lies_inside(floor, ratio.ratio)]
    if len(floors) == len(pairs) and not any(is_contradicted(stage, p, report) for _, _, p in pairs):
        shifts = sorted(ratio.ratio for ratio, _, _ in pairs)
        if len(pairs) == 1:
            return f"{whose} {_shift(shifts[0])}{other} is inside {noise_floor_in_words(floors[0])}"
        lies = f"is inside their noise floors of {floor_in_table(min(floors))} to {floor_in_table(max(floors))}"
        return f"{whose} {_shift(shifts[0])} to {_shift(shifts[-1])}{other} at {len(pairs)} workload points {lies}"
    said = []
    for ratio, floor, point in pairs:
        where = f" ({apart(point, report)})" if len(pairs) > 1 else ""
        shift = f"{whose} {_shift(ratio.ratio)}{other}{where}"
        interval = times_interval(ratio.ratio, ratio, margin_of(report))
        if is_contradicted(stage, point, report):
            beyond = f" beyond {noise_floor_in_words(floor)}" if floor is not None else ""
            said.append(
                f"{kind} was timed {ratio.verdict} than {stage.parent} all the same{where}, {times(ratio.ratio)} "
                f"({interval}){beyond}: a contradiction, for nothing in the model explains it"
            )
        elif floor is None:
            said.append(f"{shift} means nothing, for the noise floor is not known")
        elif lies_inside(floor, ratio.ratio):
            said.append(f"{shift} is inside {noise_floor_in_words(floor)}")
        else:
            why = why_undecided(ratio, point, report)
            said.append(f"{shift} ({interval}) is {ratio.verdict}" + (f": {why}" if why else ""))
    return "; ".join(said)


def _shift(ratio: float) -> str:
    """A ratio as a change in percent, with its sign."""
    return f"{ratio - 1:+.1%}".replace("%", " %").replace("-", "−")
