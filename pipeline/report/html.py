"""The report as one HTML file that needs nothing else: no script, no font, no image, no request.

The template draws; here it is decided what. Every text from a recipe, a model or a pass is escaped by the template.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.report import figures, words
from pipeline.report.charts import Axis, Dot, Scatter, Tick, Whisker, rate_axis, ratio_axis, scatter, whisker
from pipeline.report.effects import effect_in_words
from pipeline.report.machines import host_facts, target_facts
from pipeline.report.points import KINDS, point_in_words
from pipeline.report.schema import Interval, NoiseFloor, PlainRatio, Report, Speed, StageReport

TEMPLATES = Path(__file__).parent / "templates"
MOST_OPERATORS = 8
"""Operators that a stage's chart shows; the rest is counted."""

SYMBOLS = {
    "faster": "▲",
    "slower": "▼",
    "equivalent": "=",
    "inconclusive": "?",
    "identical": "≡",
    "degraded": "▽",
    "broken": "✖",
    "passed": "✓",
    "failed": "✖",
    "not_evaluated": "?",
    "skipped": "–",
    "unmeasured": "?",
    "ran": "●",
    "cached": "○",
    "baseline": "◆",
    "bad": "✖",
}
"""Beside every colour stands a sign and a word."""


class SpeedRow(NamedTuple):
    """One stage at one workload point."""

    stage: StageReport
    point: Speed
    ratio: Whisker | None
    rate: Whisker | None
    verdict: str


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


class QualityChart(NamedTuple):
    """Quality against speed, for wide and for narrow screens."""

    wide: Scatter
    narrow: Scatter
    x_title: str
    y_title: str
    front: tuple[str, ...]
    left_out: tuple[str, ...]


class Branch(NamedTuple):
    """A stage in the tree: what stands before its name."""

    stage: StageReport
    rails: str
    """The lines that lead to it, as characters."""


class OperatorBar(NamedTuple):
    name: str
    before: int
    after: int
    before_percent: float
    after_percent: float


class CostRow(NamedTuple):
    """What a stage took; widths in percent of the largest figure of the column."""

    stage: StageReport
    seconds: float | None
    making: tuple[float | None, float | None]
    """Percent: measured, estimated."""
    running: tuple[float | None, float | None]


class Card(NamedTuple):
    """Everything about one stage."""

    stage: StageReport
    number: int
    sentence: str
    verdicts: tuple[str, ...]
    operators: tuple[OperatorBar, ...]
    more_operators: int
    sample: tuple[str, str] | None
    """The sample text as far as the baseline's goes along, and from there on."""
    sample_note: str


def render_html(report: Report) -> str:
    """The whole page."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "megabytes": figures.megabytes,
        "seconds": figures.seconds,
        "rate": figures.rate,
        "percent": figures.percent,
        "times": figures.times,
        "finer": figures.finer_times,
        "gate_value": figures.gate_value,
        "parameter": parameter,
    }
    page = environment.get_template("report.html.j2").render(
        report=report,
        symbols=SYMBOLS,
        figures=figures,
        headline=tuple(map(unbroken, words.headline(report))),
        outcome=outcome(report),
        shown=shown_stage(report),
        target=target_facts(report.hardware),
        host=host_facts(report),
        same_machine=report.hardware.get("name") == "local",
        tree=tuple(tree(report)),
        glance=glance_points(report),
        speed=tuple(speed_charts(report)),
        quality=quality_chart(report),
        cost=cost_rows(report),
        cards=tuple(cards(report)),
        random_weights=words.has_random_weights(report),
        effect_in_words=effect_in_words,
        is_broken=words.is_broken,
        floor_share=figures.floor_share,
        report_link=data_link("application/json", report.to_json()),
        csv_link=data_link("text/csv", speed_csv(report)),
    )
    return page + "\n"


def outcome(report: Report) -> tuple[str, str]:
    """(a style, words) for the run as a whole."""
    broken = sum(map(words.is_broken, report.stages))
    failed = sum(s.status in {"failed", "skipped", "unmeasured"} for s in report.stages)
    gates = sum(g.result == "failed" for g in report.gates)
    told = [f"{n} {what}" for n, what in (
        (failed, "stage failed, skipped or not measured" if failed == 1 else "stages failed, skipped or not measured"),
        (broken, "model broken" if broken == 1 else "models broken"),
        (gates, "gate failed" if gates == 1 else "gates failed"),
    ) if n]  # fmt: skip
    if told:
        return "bad", ", ".join(told)
    if any(g.result == "not_evaluated" for g in report.gates):
        return "unsure", "gates not evaluated"
    return "good", "all gates passed" if report.gates else "all stages ran"


def shown_stage(report: Report) -> StageReport | None:
    """The stage whose figures stand at the top: the exported one, where it was compared with the baseline."""
    stage = next((s for s in report.stages if s.name == report.export), None)
    return stage if stage is not None and stage.name != report.baseline else None


def glance_points(report: Report) -> tuple[Speed, ...]:
    """The first workload point of each kind, in the order in which they are told."""
    points = [p for s in report.stages for p in s.speed or ()]
    found = (next((p for p in points if p.kind == kind), None) for kind in KINDS)
    return tuple(p for p in found if p is not None)


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


def speed_charts(report: Report) -> Iterator[SpeedChart]:
    """One chart for every workload point."""
    points = {(p.kind, p.batch, p.prompt): p for s in report.stages for p in s.speed or ()}
    order = sorted(points, key=lambda key: (KINDS.index(key[0]), *key[1:]))
    for key in order:
        rows = [(s, p) for s in report.stages for p in s.speed or () if (p.kind, p.batch, p.prompt) == key]
        floor = next((f for f in report.noise_floor if (f.kind, f.batch, f.prompt) == key), None)
        ratios = [v for _, p in rows if p.vs_baseline for v in (p.vs_baseline.low, p.vs_baseline.high)]
        ratios += [v for _, p in rows if p.vs_baseline for v in [p.vs_baseline.ratio]]
        ratio = ratio_axis([*ratios, *((floor.ratio_low, floor.ratio_high) if floor else ())])
        absolute = rate_axis([v for _, p in rows for v in (p.tokens_per_s.median, *_ends_to_show(p.tokens_per_s))])
        rounds, launches = max(p.rounds for _, p in rows), max(p.launches for _, p in rows)
        yield SpeedChart(
            title=point_in_words(rows[0][1]),
            counts=f"{rounds} rounds in {launches} launch{'es' if launches > 1 else ''}",
            floor=_floor(ratio, floor),
            floor_words=f"{floor.ratio_low:.3f}–{floor.ratio_high:.3f}" if floor else "",
            one=ratio.at(1.0),
            ratio_ticks=ratio.ticks,
            rate_ticks=absolute.ticks,
            rows=tuple(
                SpeedRow(
                    stage=stage,
                    point=point,
                    ratio=whisker(ratio, point.vs_baseline) if point.vs_baseline else None,
                    rate=whisker(absolute, point.tokens_per_s),
                    verdict=_verdict(stage, point, report),
                )
                for stage, point in rows
            ),
        )


def quality_chart(report: Report) -> QualityChart | None:
    """None where fewer than two stages have both figures."""
    points = glance_points(report)
    if not points:
        return None
    first = points[0]
    random = words.has_random_weights(report)
    dots, left_out = [], []
    for stage in report.stages:
        point = next((p for p in stage.speed or () if _same_point(p, first)), None)
        if stage.quality is None or point is None:
            continue
        loss = _loss(stage, report, random=random)
        if words.is_broken(stage) or loss is None:
            left_out.append(stage.name)
            continue
        dots.append(Dot(stage.name, point.tokens_per_s, loss, stage.name in report.pareto,
                        stage.name == report.baseline))  # fmt: skip
    if len(dots) < 2:
        return None
    against = f"× {report.baseline}, lower is better"
    return QualityChart(
        wide=scatter(dots, width=920, height=430, font=14, longest=24),
        narrow=scatter(dots, width=360, height=400, font=13, longest=16),
        x_title=f"tokens/s, {point_in_words(first)}",
        y_title=f"1 + KL from {report.baseline}, lower is better" if random else f"perplexity {against}",
        front=tuple(n for n in report.pareto if n in {d.name for d in dots}),
        left_out=tuple(left_out),
    )


def cost_rows(report: Report) -> tuple[CostRow, ...]:
    """What making and running each model took, with what was estimated beside it."""

    def largest(values: Sequence[float | None]) -> float:
        return max([v for v in values if v is not None], default=0) or 1

    made = [s for s in report.stages if s.artifact is not None or s.predicted_memory is not None]
    wall = largest([s.cost.wall_s for s in made])
    pairs = [(_making(s), _running(s)) for s in made]
    making, running = (largest([v for pair in pairs for v in pair[i]]) for i in (0, 1))

    def shares(pair: tuple[int | None, int | None], whole: float) -> tuple[float | None, float | None]:
        measured, estimated = (None if v is None else round(100 * v / whole, 2) for v in pair)
        return measured, estimated

    return tuple(
        CostRow(
            stage=stage,
            seconds=None if stage.cost.wall_s is None else round(100 * stage.cost.wall_s / wall, 2),
            making=shares(make, making),
            running=shares(run, running),
        )
        for stage, (make, run) in zip(made, pairs, strict=True)
    )


def cards(report: Report) -> Iterator[Card]:
    base = next((s for s in report.stages if s.name == report.baseline), None)
    reference = base.quality.sample_text if base and base.quality else None
    for i, stage in enumerate(report.stages):
        bars = _operator_bars(stage)
        sample, note = _sample(stage, reference, report)
        yield Card(
            stage=stage,
            number=i,
            sentence=unbroken(words.sentence(stage, report)),
            verdicts=tuple(_verdicts(stage, report)),
            operators=bars[:MOST_OPERATORS],
            more_operators=max(0, len(bars) - MOST_OPERATORS),
            sample=sample,
            sample_note=note,
        )


def parameter(value: Any) -> str:
    """A parameter's value as YAML would take it in one line."""
    return json.dumps(value, ensure_ascii=False)


def unbroken(text: str) -> str:
    """The text with its figures and their units kept on one line."""
    return re.sub(r"(?<=\d) (?=(×|%|[KMG]B|s|nodes|tokens/s)(\W|$))", "\u00a0", text)


def data_link(kind: str, text: str) -> str:
    """A `data:` address that holds the text itself."""
    return f"data:{kind};charset=utf-8;base64,{base64.b64encode(text.encode()).decode()}"


def speed_csv(report: Report) -> str:
    """Every speed with its interval, one line for each stage and workload point."""
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    ends = ("low", "high")
    table.writerow(
        ["stage", "kind", "batch", "prompt", "new_tokens", "rounds", "launches"]
        + ["tokens_per_s", *(f"tokens_per_s_{e}" for e in ends), "latency_s", *(f"latency_s_{e}" for e in ends)]
        + [f"{of}{end}" for of in ("vs_baseline", "vs_parent") for end in ("", "_low", "_high", "_verdict")]
    )
    for stage in report.stages:
        # a spreadsheet runs what begins with one of these
        name = f"'{stage.name}" if stage.name.startswith(("=", "+", "-", "@")) else stage.name
        for p in stage.speed or ():
            row: list[Any] = [name, p.kind, p.batch, p.prompt, p.new_tokens, p.rounds, p.launches]
            for figure in (p.tokens_per_s, p.latency_s):
                row += [figure.median, figure.low, figure.high]
            for ratio in (p.vs_baseline, p.vs_parent):
                row += [ratio.ratio, ratio.low, ratio.high, ratio.verdict] if ratio else ["", "", "", ""]
            table.writerow(row)
    return out.getvalue()


def _ends_to_show(figure: Interval) -> tuple[float, float]:
    """An interval's ends for an axis: one wild interval may not push all others into a corner."""
    return figure.low, min(figure.high, 2.5 * figure.median)


def _floor(axis: Axis, floor: NoiseFloor | None) -> Whisker | None:
    if floor is None:
        return None
    return Whisker(axis.at(1.0), axis.at(floor.ratio_low), axis.at(floor.ratio_high))


def _verdict(stage: StageReport, point: Speed, report: Report) -> str:
    if stage.name == report.baseline:
        return "baseline"
    return point.vs_baseline.verdict if point.vs_baseline else ""


def _verdicts(stage: StageReport, report: Report) -> Iterator[str]:
    """What the badges of a stage's card say: `decode faster`, `degraded` …"""
    if stage.name == report.baseline:
        yield "baseline"
    for first in glance_points(report):
        for point in stage.speed or ():
            if _same_point(point, first) and point.vs_baseline is not None:
                yield f"{point.kind} {point.vs_baseline.verdict}"
    if stage.quality and stage.quality.vs_baseline:
        yield stage.quality.vs_baseline.verdict


def _same_point(a: Speed, b: Speed) -> bool:
    return (a.kind, a.batch, a.prompt) == (b.kind, b.batch, b.prompt)


def _loss(stage: StageReport, report: Report, *, random: bool) -> PlainRatio | None:
    """How much worse than the baseline's a stage's predictions are; for random weights, by agreement alone."""
    if stage.name == report.baseline:
        return PlainRatio(ratio=1.0, low=None, high=None)
    paired = stage.quality.vs_baseline if stage.quality else None
    if paired is None:
        return None
    if random:
        return None if paired.kl_divergence is None else PlainRatio(ratio=1 + paired.kl_divergence, low=None, high=None)
    return paired.perplexity_ratio if paired.perplexity_ratio.ratio else None


def _making(stage: StageReport) -> tuple[int | None, int | None]:
    predicted = stage.predicted_memory
    return stage.cost.peak_memory_bytes, predicted.conversion_bytes if predicted else None


def _running(stage: StageReport) -> tuple[int | None, int | None]:
    predicted = stage.predicted_memory
    return stage.inference_peak_memory_bytes, predicted.inference_bytes if predicted else None


def _operator_bars(stage: StageReport) -> tuple[OperatorBar, ...]:
    """The operators whose number changed, those that changed most first."""
    operators = stage.effect.operators if stage.effect else {}
    most = max((max(pair) for pair in operators.values()), default=1) or 1
    order = sorted(operators.items(), key=lambda item: (-abs(item[1][1] - item[1][0]), item[0]))
    return tuple(
        OperatorBar(name, before, after, round(100 * before / most, 2), round(100 * after / most, 2))
        for name, (before, after) in order
    )


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
