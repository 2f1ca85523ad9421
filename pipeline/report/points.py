"""The workload points of a report: which there are, in which order they are told, and what they are called."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.report.comparison import ComparedSpeed
from pipeline.report.schema import NoiseFloor, PairedSpeed, PointKey, Report, Speed, StageReport

KINDS = ("decode", "prefill", "forward")
"""In the order in which they are told: what a user of a language model waits for comes first."""

TIME_WORDS = {"decode": "time per token", "prefill": "time to first token", "forward": "time per pass"}
"""What `latency_s` is of."""


def points_of(report: Report) -> tuple[Speed, ...]:
    """One measurement for each workload point, in the order in which points are told."""
    found: dict[PointKey, Speed] = {}
    for stage in report.stages:
        for point in stage.speed or ():
            found.setdefault(point.point, point)
    return tuple(found[key] for key in sorted(found, key=_order))


def first_points(report: Report) -> tuple[Speed, ...]:
    """The first workload point of each kind: the one that stands for the kind where there is room for one."""
    timed = [p for s in report.stages for p in s.speed or ()]
    found = (next((p for p in timed if p.kind == kind), None) for kind in KINDS)
    return tuple(p for p in found if p is not None)


def speed_at(stage: StageReport, point: Speed) -> Speed | None:
    """The stage's own figures at a workload point; None where it was not timed there."""
    return next((p for p in stage.speed or () if p.point == point.point), None)


def timed_at(report: Report, point: Speed) -> Iterator[tuple[StageReport, Speed]]:
    """The stages that were timed at a workload point, each with its figures."""
    for stage in report.stages:
        own = speed_at(stage, point)
        if own is not None:
            yield stage, own


def point_in_words(point: Speed | PairedSpeed | NoiseFloor | ComparedSpeed) -> str:
    """The work that was timed."""
    if point.kind == "decode":
        tokens = "" if point.new_tokens is None else f"of {point.new_tokens} tokens "
        return f"decode {tokens}after {point.prompt}, batch {point.batch}"
    what = "prefill" if point.kind == "prefill" else "forward pass"
    return f"{what} of {point.prompt} tokens, batch {point.batch}"


def apart(point: Speed, report: Report) -> str:
    """What tells a workload point from the others of its kind: `batch 4, prompt 512`; empty where there is no other."""
    others = [p for p in points_of(report) if p.kind == point.kind]
    length = "length" if point.kind == "forward" else "prompt"
    told = [("batch", "batch"), ("prompt", length), ("new_tokens", "new tokens")]
    differ = [(field, word) for field, word in told if len({getattr(p, field) for p in others}) > 1]
    return ", ".join(f"{word} {getattr(point, field)}" for field, word in differ)


def _order(key: PointKey) -> tuple[int, int, int, int]:
    kind, batch, prompt, new_tokens = key
    return KINDS.index(kind), batch, prompt, new_tokens or 0


def is_faster(stage: StageReport, other: StageReport, point: Speed, report: Report) -> bool:
    """Whether the one was shown to be faster than the other at a workload point.

    By the 95 % interval of their own ratio, from the rounds that both ran in. Where the report does not have it, by the
    intervals of their ratios to the baseline, or of their speeds, if these do not overlap: that shows less.
    """
    for contrast in report.contrasts:
        if contrast.point == point.point and {contrast.stage, contrast.other} == {stage.name, other.name}:
            return contrast.low > 1 if contrast.stage == stage.name else contrast.high < 1
    mine, theirs = speed_at(stage, point), speed_at(other, point)
    if mine is None or theirs is None:
        return False
    if stage.parent == other.name and mine.vs_parent is not None:
        return mine.vs_parent.low > 1
    if other.parent == stage.name and theirs.vs_parent is not None:
        return theirs.vs_parent.high < 1
    if other.name == report.baseline and mine.vs_baseline is not None:
        return mine.vs_baseline.low > 1
    if stage.name == report.baseline and theirs.vs_baseline is not None:
        return theirs.vs_baseline.high < 1
    if mine.vs_baseline is not None and theirs.vs_baseline is not None:
        return mine.vs_baseline.low > theirs.vs_baseline.high
    return mine.tokens_per_s.low > theirs.tokens_per_s.high
