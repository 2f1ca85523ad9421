"""What the page shows of each stage, as values: its place in the tree, and its card."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from markupsafe import Markup

from pipeline.report import effects, words
from pipeline.report.effects import changed_counts, effect_facts
from pipeline.report.graph_drawing import caption, draw
from pipeline.report.points import first_points, speed_at
from pipeline.report.schema import (
    Divergence,
    Report,
    StageReport,
)
from pipeline.report.speed_panels import shown_verdict
from pipeline.report.verdicts import (
    is_contradicted,
)

MOST_OPERATORS = 8
"""Operators that a stage's chart shows; the rest is counted."""


class Branch(NamedTuple):
    """A stage in the tree: what stands before its name."""

    stage: StageReport
    rails: str
    """The lines that lead to it, as characters."""


class CountBar(NamedTuple):
    """How many there were of something, and how many there are; in numbers and in percent of the longest bar."""

    name: str
    before: int
    after: int
    before_percent: float
    after_percent: float


class CountBars(NamedTuple):
    title: str
    bars: tuple[CountBar, ...]
    more: int
    """Those that changed, too, and for which there is no room."""


class LayerBar(NamedTuple):
    """A layer's relative error, in percent of the largest."""

    name: str
    width: float
    error: str
    mark: str
    """`first`, `adds most`, both, or nothing."""
    own: str
    """The error that the layer has by itself; empty where that is not known."""


class LayerChart(NamedTuple):
    title: str
    bars: tuple[LayerBar, ...]


class Card(NamedTuple):
    """Everything about one stage."""

    stage: StageReport
    number: int
    sentence: str
    verdicts: tuple[tuple[str, str], ...]
    """A style and words of each badge."""
    facts: tuple[tuple[str, str], ...]
    counts: tuple[CountBars, ...]
    region: Markup | None
    """The changed nodes of one layer, drawn before and after; its words are escaped where it is drawn."""
    region_words: str
    layers: LayerChart | None
    sample: tuple[str, str] | None
    """The sample text as far as the baseline's goes along, and from there on."""
    sample_note: str


def tree(report: Report) -> Iterator[Branch]:
    """The stages as a tree, parents first. A chain goes straight down; only a fork moves to the right."""
    names = {s.name for s in report.stages}
    children: dict[str | None, list[StageReport]] = {}
    for stage in report.stages:
        children.setdefault(stage.parent if stage.parent in names else None, []).append(stage)

    def below(parent: str | None, rails: str) -> Iterator[Branch]:
        here = children.get(parent, [])
        for i, stage in enumerate(here):
            last = i == len(here) - 1
            if parent is None:
                yield Branch(stage, "")
                yield from below(stage.name, "")
            elif len(here) == 1:
                yield Branch(stage, rails + "↓")
                yield from below(stage.name, rails)
            else:
                yield Branch(stage, rails + ("└" if last else "├"))
                yield from below(stage.name, rails + (" " if last else "│"))

    yield from below(None, "")


def cards(report: Report) -> Iterator[Card]:
    base = next((s for s in report.stages if s.name == report.baseline), None)
    reference = base.quality.sample_text if base and base.quality else None
    for i, stage in enumerate(report.stages):
        sample, note = _sample(stage, reference, report)
        region = stage.effect.region if stage.effect else None
        yield Card(
            stage=stage,
            number=i,
            sentence=unbroken(words.sentence(stage, report)),
            verdicts=tuple(_verdicts(stage, report)),
            facts=tuple(effect_facts(stage)),
            counts=tuple(_count_bars(title, counts) for title, counts in changed_counts(stage)),
            region=Markup(draw(region)) if region else None,  # noqa: S704 - draw escapes every word of a stranger
            region_words=caption(region) if region else "",
            layers=layer_chart(stage.quality.divergence) if stage.quality and stage.quality.divergence else None,
            sample=sample,
            sample_note=note,
        )


def layer_chart(found: Divergence) -> LayerChart:
    """Relative error by layer; what is not finite fills its row."""
    largest = max((e.relative_error for e in found.layers if e.relative_error is not None), default=0.0) or 1.0
    matched = f", {found.matched[0]} of {found.matched[1]} layers matched" if found.matched else ""
    part = f" of {found.component}" if found.component else ""
    against = words.reference_in_words(found)
    return LayerChart(
        title=f"Relative error by layer{part} against {against}, on {found.tokens:,} tokens{matched}",
        bars=tuple(
            LayerBar(
                name=layer.layer,
                width=100.0 if layer.relative_error is None else round(100 * layer.relative_error / largest, 2),
                error="not finite" if layer.relative_error is None else f"{layer.relative_error:.2g}",
                mark=words.layer_mark(layer.layer, found),
                own="" if layer.added is None else f"{layer.added:.2g} by itself",
            )
            for layer in found.layers
        ),
    )


def unbroken(text: str) -> str:
    """The text with its figures and their units kept on one line."""
    return re.sub(r"(?<=\d) (?=(×|%|[KMG]B|[mµ]?s|nodes|rounds|tokens/s)(\W|$))", "\u00a0", text)


def _verdicts(stage: StageReport, report: Report) -> Iterator[tuple[str, str]]:
    """(a style, words) of the badges of a stage's card: `decode faster`, `degraded` …"""
    if stage.name == report.baseline:
        yield "baseline", "baseline"
    for first in first_points(report):
        point = speed_at(stage, first)
        if point is not None and point.vs_baseline is not None:
            shown = shown_verdict(stage, point, report)
            if shown in {"broken", "contradiction"}:  # the speed of garbage, and what nothing explains, is no success
                yield "plain", f"{point.kind} {point.vs_baseline.verdict}"
            else:
                yield shown, f"{point.kind} {shown}"
    if effects.contradiction(stage) or any(is_contradicted(stage, p, report) for p in stage.speed or ()):
        yield "contradiction", "contradiction"
    if flag := words.short_flag(stage):
        yield "flag", flag
    if stage.quality and stage.quality.vs_baseline:
        yield stage.quality.vs_baseline.verdict, stage.quality.vs_baseline.verdict


def _count_bars(title: str, counts: Mapping[str, tuple[int, int]]) -> CountBars:
    """Those whose number changed most first."""
    most = max((max(pair) for pair in counts.values()), default=1) or 1
    bars = tuple(
        CountBar(name, before, after, round(100 * before / most, 2), round(100 * after / most, 2))
        for name, (before, after) in effects.most_changed(counts)
    )
    return CountBars(f"{title} before and after", bars[:MOST_OPERATORS], max(0, len(bars) - MOST_OPERATORS))


def _sample(stage: StageReport, reference: str | None, report: Report) -> tuple[tuple[str, str] | None, str]:
    """(the text split where it leaves the baseline's, a note on where that is)."""
    quality = stage.quality
    if quality is None or quality.sample_text is None:
        return None, ""
    text = quality.sample_text
    paired = quality.vs_baseline
    if paired is None or reference is None or stage.name == report.baseline:
        return (text, ""), ""
    if paired.first_divergence is None:
        return (text, ""), f"the same text as {report.baseline}'s"
    pairs = zip(text, reference, strict=False)
    shared = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(text), len(reference)))
    return (text[:shared], text[shared:]), f"leaves {report.baseline}'s text at token {paired.first_divergence}"
