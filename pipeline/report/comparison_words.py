"""What a comparison of two runs says in words and figures, the same in the terminal, in Markdown and in HTML."""

from __future__ import annotations

from pipeline.report.cells_words import signed
from pipeline.report.comparison import ComparedSpeed, ComparedStage, Comparison, Unlike
from pipeline.report.figures import (
    ABSENT,
    USABLE_FLOOR,
    duration,
    finer_times,
    floor_interval,
    floor_share,
    megabytes,
    number,
    times,
    times_interval,
)
from pipeline.report.verdicts import rounds_in_words


def headline(comparison: Comparison) -> list[str]:
    """What was found, the most urgent first. What was forced stands before everything."""
    said = []
    if comparison.forced:
        said.append(f"NOT COMPARABLE in {', '.join(d.what for d in comparison.forced)}; measured because of --force.")
    for verdict in ("slower", "faster"):
        found = [
            f"{s.name} ({where})" for s in comparison.stages if not s.same_artifact and (where := _found(s, verdict))
        ]
        if found:
            said.append(f"{verdict.capitalize()} in RUN_B: {'; '.join(found)}.")
    for stage in comparison.stages:
        if stage.name in comparison.contradicted:
            timed = " and ".join(f"{v} ({where})" for v in ("slower", "faster") if (where := _found(stage, v)))
            said.append(
                f"Contradiction: {stage.name} is the same artifact in both runs, and yet was timed {timed} in RUN_B; "
                "no pass did that."
            )
    worse = [s.name for s in comparison.stages if _worse(s)]
    if worse:
        said.append(f"Predicts worse in RUN_B: {', '.join(worse)}.")
    undecided = [s.name for s in comparison.stages if _found(s, "inconclusive")]
    if undecided:
        said.append(f"Not decided: {', '.join(undecided)}.")
    equal = [
        s.name
        for s in comparison.stages
        if s.speed and all(p.ratio is not None and p.ratio.verdict == "equivalent" for p in s.speed)
    ]
    if equal:
        said.append(f"As fast as in RUN_A, within {comparison.margin:.0%}: {', '.join(equal)}.".replace("%", " %"))
    lost = [s.name for s in comparison.stages if s.status in {"failed", "absent"}]
    if lost:
        said.append(f"Could not be compared: {', '.join(lost)}.")
    return said


def _found(stage: ComparedStage, verdict: str) -> str:
    """The workload points at which a stage got the verdict."""
    found = [p for p in stage.speed if p.ratio is not None and p.ratio.verdict == verdict]
    return ", ".join(
        f"{p.kind} {times(p.ratio.ratio)}" + ("" if p.paired else ", unpaired") for p in found if p.ratio is not None
    )


QUALITIES = ("identical", "equivalent", "degraded", "broken")


def _worse(stage: ComparedStage) -> bool:
    """Whether B's verdict against its baseline is a worse one than A's."""
    quality = stage.quality
    if quality is None or quality.a_verdict is None or quality.b_verdict is None:
        return False
    rank = {word: i for i, word in enumerate(QUALITIES)}
    return rank[quality.b_verdict] > max(1, rank[quality.a_verdict])  # identical and equivalent are both well


def ratio_in_words(point: ComparedSpeed, comparison: Comparison) -> tuple[str, str]:
    """(the ratio, its interval)."""
    if point.ratio is None:
        return ABSENT, ""
    return times(point.ratio.ratio), times_interval(point.ratio.ratio, point.ratio, comparison.margin)


def outcome(comparison: Comparison) -> tuple[str, str]:
    """(a style, words) for the comparison as a whole."""
    verdicts = [p.ratio.verdict if p.ratio is not None else None for s in comparison.stages for p in s.speed]
    if comparison.slower:
        return "bad", f"slower in RUN_B: {', '.join(comparison.slower)}"
    if comparison.contradicted:
        return "unsure", f"the same artifact, timed otherwise: {', '.join(comparison.contradicted)}"
    if not verdicts or any(v in {None, "inconclusive"} for v in verdicts):
        return "unsure", "not all is decided"
    if "slower" in verdicts:
        return "unsure", "slower in RUN_B, though from no common rounds"
    if "faster" in verdicts:
        return "good", "faster in RUN_B, and nothing slower"
    return "plain", "equally fast"


def claim(point: ComparedSpeed, stage: ComparedStage) -> str:
    """The verdict, with all that a reader has to know before believing it."""
    told = caveat(point, stage)
    word = shown_verdict(point, stage)
    return ", ".join(filter(None, (word, told)))


def shown_verdict(point: ComparedSpeed, stage: ComparedStage) -> str:
    """What the ratio is called: no success and no loss where both are one artifact. Empty where there is none."""
    if stage.contradicts(point):
        return "contradiction"
    return point.ratio.verdict if point.ratio is not None else ""


def caveat(point: ComparedSpeed, stage: ComparedStage) -> str:
    """What a reader has to know before believing the verdict; why there is none."""
    if point.ratio is None:
        return point.reason or "not known"
    ratio = point.ratio
    told: list[str] = []
    if ratio.verdict == "inconclusive" and (rounds := rounds_in_words(ratio)):
        told.append(f"{rounds} rounds may decide")
    if not point.paired:
        told.append(f"unpaired, from {point.runs_in_history} runs")
    if stage.contradicts(point):
        told.append(f"{ratio.verdict} though it is the same artifact: this is noise that the intervals do not cover")
    return ", ".join(told)


def basis(point: ComparedSpeed) -> str:
    """What the ratio rests on."""
    if not point.paired:
        return "unpaired"
    return f"{point.rounds} rounds, {point.launches} launch{'es' if point.launches != 1 else ''}"


def times_of(point: ComparedSpeed) -> tuple[str, str]:
    """(A's median time, B's)."""
    return tuple(ABSENT if t is None else duration(t) for t in (point.a_latency_s, point.b_latency_s))  # type: ignore[return-value]


def quality_in_words(stage: ComparedStage) -> tuple[str, str]:
    """(the ratio of perplexities, verdicts or why there is none)."""
    quality = stage.quality
    if quality is None:
        return ABSENT, "not measured in both runs"
    verdicts = f"{quality.a_verdict or 'baseline'} → {quality.b_verdict or 'baseline'}"
    if quality.perplexity_ratio is None:
        return ABSENT, f"{verdicts}; {quality.reason}" if quality.reason else verdicts
    figures = f"{number(quality.a_perplexity, '.3f')} → {number(quality.b_perplexity, '.3f')}"
    return finer_times(quality.perplexity_ratio), f"{figures}, {verdicts}"


def artifact_in_words(stage: ComparedStage) -> str:
    if stage.same_artifact:
        return "the same artifact"
    a, b = stage.size_bytes
    return f"{megabytes(a)} → {megabytes(b)}"


def difference_in_words(unlike: Unlike) -> str:
    here = f"; {unlike.here} here" if unlike.here is not None else ""
    return f"{unlike.what}: {unlike.a} in RUN_A, {unlike.b} in RUN_B{here}"


def floors_in_words(comparison: Comparison) -> list[str]:
    """The schedule's baseline against itself, by workload point."""
    return [f"{point}: {_floor(low, high, comparison.margin)}" for point, (low, high) in comparison.noise_floor.items()]


def _floor(low: float, high: float, margin: float) -> str:
    if floor_share(low, high) >= USABLE_FLOOR:
        return floor_interval(low, high)
    return f"{signed(low, margin)} to {signed(high, margin)} %"


def schedule_in_words(comparison: Comparison) -> str:
    if comparison.baseline is None:
        return "Nothing was measured again."
    launches = f"{comparison.launches} launch{'es' if comparison.launches != 1 else ''}"
    return (
        f"{comparison.rounds} rounds in {launches} within {comparison.budget_s:g} s, "
        f"{comparison.baseline.removeprefix('a.')} of RUN_A in each; a ratio above 1 means that RUN_B's is faster."
    )
