"""What the page shows of speed, as values: the figures at its top, and a chart for each workload point."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from pipeline.report import figures, words
from pipeline.report.charts import Axis, Tick, Whisker, rate_axis, ratio_axis, whisker
from pipeline.report.points import first_points, point_in_words, points_of, speed_at, timed_at
from pipeline.report.schema import (
    Interval,
    NoiseFloor,
    QualityFacts,
    QualityRatio,
    Ratio,
    Report,
    Speed,
    StageReport,
)
from pipeline.report.verdicts import (
    counts_in_words,
    is_contradicted,
    margin_of,
    outliers_in_words,
    why_undecided,
)

PER = {"decode": "a token", "prefill": "first token", "forward": "a pass"}


class Tile(NamedTuple):
    """A figure of the exported model at the top of the page."""

    what: str
    value: str
    """A doubtful figure does not stand here, but what makes it doubtful."""
    below: str
    badge: str
    doubtful: bool = False
    note: str = ""


class SpeedRow(NamedTuple):
    """One stage at one workload point."""

    stage: StageReport
    point: Speed
    ratio: Whisker | None
    rate: Whisker | None
    verdict: str
    """What it is drawn and called as: broken and contradicted stages are neither faster nor slower."""
    interval: str
    time: tuple[str, ...]
    notes: tuple[str, ...]
    flag: str


class SpeedChart(NamedTuple):
    """All stages at one workload point."""

    title: str
    counts: str
    floor: Whisker | None
    floor_words: str
    one: float
    ratio_ticks: tuple[Tick, ...]
    rate_ticks: tuple[Tick, ...]
    rows: tuple[SpeedRow, ...]


def shown_stage(report: Report) -> StageReport | None:
    """The stage whose figures stand at the top: the exported one, where it was compared with the baseline."""
    stage = next((s for s in report.stages if s.name == report.export), None)
    return stage if stage is not None and stage.name != report.baseline else None


def tiles(report: Report) -> Iterator[Tile]:
    """The exported model's figures against the baseline's."""
    stage = shown_stage(report)
    if stage is None:
        return
    for first in first_points(report):
        own = speed_at(stage, first)
        if own is not None and own.vs_baseline is not None:
            yield _speed_tile(stage, own, own.vs_baseline, report)
    if stage.quality and stage.quality.vs_baseline:
        yield _quality_tile(stage.quality, stage.quality.vs_baseline, report)
    base = next((s for s in report.stages if s.name == report.baseline), None)
    sizes = [(s.artifact.size_bytes if s and s.artifact else None) for s in (stage, base)]
    memory = [(s.inference_peak_memory_bytes if s else None) for s in (stage, base)]
    for what, (mine, theirs) in (("size", sizes), ("memory to run", memory)):
        if mine:
            below = f"{report.baseline}: {figures.megabytes(theirs)}" if theirs else ""
            yield Tile(what, figures.megabytes(mine), below, "")


def _speed_tile(stage: StageReport, point: Speed, ratio: Ratio, report: Report) -> Tile:
    shown = shown_verdict(stage, point, report)
    figure = figures.times(ratio.ratio)
    interval = f"95 %: {figures.times_interval(ratio.ratio, ratio, margin_of(report))}"
    if shown in {"inconclusive", "broken", "contradiction"}:
        note = why_undecided(ratio, point, report)
        return Tile(f"{point.kind} speed", shown, f"{figure}, {interval}", shown, doubtful=True, note=note)
    return Tile(f"{point.kind} speed", figure, interval, shown, note=words.short_flag(stage))


def _quality_tile(quality: QualityFacts, paired: QualityRatio, report: Report) -> Tile:
    ratio = paired.perplexity_ratio
    if words.has_random_weights(report):
        what, figure = "same most likely token", figures.percent(paired.top1_agreement)
        below = f"of {quality.compared_tokens or quality.tokens} tokens"
    else:
        what, figure = "perplexity", figures.finer_times(ratio.ratio)
        below = f"95 %: {figures.finer_interval(ratio.ratio, ratio)}"
    note = words.reason_to_tell(paired)
    if paired.verdict == "broken":
        return Tile(what, "broken", f"{figure}, {below}", "broken", doubtful=True, note=note)
    return Tile(what, figure, below, paired.verdict, note=note)


def shown_verdict(stage: StageReport, point: Speed, report: Report) -> str:
    """What a stage's speed is called: no success where it is broken, or changed nothing."""
    if stage.name == report.baseline:
        return "baseline"
    if words.is_broken(stage):
        return "broken"
    if is_contradicted(stage, point, report):
        return "contradiction"
    return point.vs_baseline.verdict if point.vs_baseline else ""


def speed_charts(report: Report) -> Iterator[SpeedChart]:
    """One chart for every workload point."""
    for first in points_of(report):
        rows = list(timed_at(report, first))
        floor = report.floor_at(first)
        ratios = [v for _, p in rows if p.vs_baseline for v in (p.vs_baseline.low, p.vs_baseline.high)]
        ratios += [p.vs_baseline.ratio for _, p in rows if p.vs_baseline]
        ratio = ratio_axis([*ratios, *((floor.ratio_low, floor.ratio_high) if floor else ())])
        absolute = rate_axis([v for _, p in rows for v in (p.tokens_per_s.median, *_ends_to_show(p.tokens_per_s))])
        yield SpeedChart(
            title=point_in_words(first),
            counts=counts_in_words([p for _, p in rows]),
            floor=_floor(ratio, floor),
            floor_words=figures.floor_interval(floor.ratio_low, floor.ratio_high) if floor else "",
            one=ratio.at(1.0),
            ratio_ticks=ratio.ticks,
            rate_ticks=absolute.ticks,
            rows=tuple(_speed_row(stage, point, ratio, absolute, report) for stage, point in rows),
        )


def _speed_row(stage: StageReport, point: Speed, ratio_axis: Axis, rate_axis: Axis, report: Report) -> SpeedRow:
    ratio, time = point.vs_baseline, point.latency_s
    notes = [why_undecided(ratio, point, report) if ratio else ""]
    if is_contradicted(stage, point, report):
        notes.append("it changed nothing")
    elif words.is_broken(stage) and ratio:
        notes.append(f"{ratio.verdict}, but garbage")
    notes.append(outliers_in_words(point))
    written = [f"{figures.duration(time.median)} {PER[point.kind]}"]
    if point.kind == "forward":
        written.append(figures.duration_interval(time.median, time))
    return SpeedRow(
        stage=stage,
        point=point,
        ratio=whisker(ratio_axis, ratio) if ratio else None,
        rate=whisker(rate_axis, point.tokens_per_s),
        verdict=shown_verdict(stage, point, report),
        interval=figures.times_interval(ratio.ratio, ratio, margin_of(report)) if ratio else "",
        time=tuple(written),
        notes=tuple(filter(None, notes)),
        flag=words.short_flag(stage),
    )


def _ends_to_show(figure: Interval) -> tuple[float, float]:
    """An interval's ends for an axis: one wild interval may not push all others into a corner."""
    return figure.low, min(figure.high, 2.5 * figure.median)


def _floor(axis: Axis, floor: NoiseFloor | None) -> Whisker | None:
    if floor is None:
        return None
    return Whisker(axis.at(1.0), axis.at(floor.ratio_low), axis.at(floor.ratio_high))
