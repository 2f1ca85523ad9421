"""The report as one HTML file that needs nothing else: no script, no font, no image, no request.

The template draws; here it is decided what. Every text from a recipe, a model or a pass is escaped by the template.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from pipeline.report import figures, words
from pipeline.report.charts import Dot, Scatter, scatter
from pipeline.report.effects import effect_in_words
from pipeline.report.graph_drawing import STYLE as REGION_STYLE
from pipeline.report.machines import host_facts, measured_to_run, target_facts
from pipeline.report.page import render_page
from pipeline.report.pareto import ALIKE, loss_of
from pipeline.report.points import apart, first_points, point_in_words, speed_at
from pipeline.report.printable import without_controls
from pipeline.report.schema import (
    Report,
    StageReport,
)
from pipeline.report.speed_csv import speed_csv
from pipeline.report.speed_panels import shown_stage, shown_verdict, speed_charts, tiles
from pipeline.report.stage_cards import cards, tree, unbroken
from pipeline.report.tables import ablation_table, roofline_table
from pipeline.report.verdicts import (
    RATIO_NOTE,
    is_contradicted,
    margin_of,
    schedule_in_words,
)

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
    "contradiction": "≠",
    "flag": "⚑",
}
"""Beside every colour stands a sign and a word."""


class QualityChart(NamedTuple):
    """Quality against speed, for wide and for narrow screens."""

    wide: Scatter
    narrow: Scatter
    x_title: str
    y_title: str
    front: tuple[str, ...]
    left_out: tuple[str, ...]


class CostRow(NamedTuple):
    """What a stage took; widths in percent of the largest figure of the column."""

    stage: StageReport
    seconds: float | None
    making: tuple[float | None, float | None]
    """Percent: measured, estimated."""
    running: tuple[float | None, float | None]


def render_html(report: Report) -> str:
    """The whole page."""
    exact, report = report, without_controls(report)
    filters: dict[str, Callable[..., Any]] = {
        "megabytes": figures.megabytes,
        "seconds": figures.seconds,
        "rate": figures.rate,
        "percent": figures.percent,
        "times": figures.times,
        "finer": figures.finer_times,
        "gate_value": figures.gate_value,
        "parameter": parameter,
        "breakable": breakable,
    }
    return render_page(
        "report.html.j2",
        filters=filters,
        report=report,
        symbols=SYMBOLS,
        figures=figures,
        headline=tuple(map(unbroken, words.headline(report))),
        outcome=outcome(report),
        shown=shown_stage(report),
        tiles=tuple(tiles(report)),
        schedule=schedule_in_words(report.schedule) if report.schedule else "",
        ratio_note=RATIO_NOTE,
        margin=margin_of(report),
        tables=tuple(filter(None, (roofline_table(report), ablation_table(report)))),
        stage_numbers={stage.name: i for i, stage in enumerate(report.stages)},
        target=target_facts(report.hardware),
        host=host_facts(report),
        same_machine=report.hardware.get("name") == "local",
        tree=tuple(tree(report)),
        glance=first_points(report),
        speed_at=speed_at,
        apart=lambda point: apart(point, report),
        shown_verdict=lambda stage, point: shown_verdict(stage, point, report),
        short_flag=words.short_flag,
        reason_to_tell=words.reason_to_tell,
        is_extra=lambda stage: words.is_extra(stage, report),
        earned_back=words.earned_back,
        alike=predict_alike(report),
        point_in_words=point_in_words,
        front_kind=words.front_kind(report),
        region_style=Markup(REGION_STYLE),  # noqa: S704 - a constant
        speed=tuple(speed_charts(report)),
        quality=quality_chart(report),
        cost=cost_rows(report),
        cards=tuple(cards(report)),
        random_weights=words.has_random_weights(report),
        effect_in_words=effect_in_words,
        is_broken=words.is_broken,
        report_link=data_link("application/json", exact.to_json()),
        csv_link=data_link("text/csv", speed_csv(report)),
    )


def outcome(report: Report) -> tuple[str, str]:
    """(a style, words) for the run as a whole."""
    own = [stage for stage in report.stages if not words.is_extra(stage, report)]
    broken = sum(map(words.is_broken, own))
    failed = sum(s.status in {"failed", "skipped", "unmeasured"} for s in own)
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


def quality_chart(report: Report) -> QualityChart | None:
    """None where fewer than two stages have both figures, or all predict alike."""
    points = first_points(report)
    if not points:
        return None
    first = points[0]
    random = words.has_random_weights(report)
    dots, left_out = [], []
    for stage in report.stages:
        point = speed_at(stage, first)
        if stage.quality is None or point is None:
            continue
        loss = loss_of(stage, report)
        if words.is_broken(stage) or loss is None or is_contradicted(stage, point, report):
            left_out.append(stage.name)
            continue
        dots.append(Dot(stage.name, point.tokens_per_s, loss, stage.name in report.pareto,
                        stage.name == report.baseline))  # fmt: skip
    if len(dots) < 2 or predict_alike(report):
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


def predict_alike(report: Report) -> bool:
    """Whether several models were scored whose quality does not tell them apart; broken ones aside."""
    whole = [s for s in report.stages if s.quality is not None and not words.is_broken(s)]
    losses = [loss.ratio for s in whole if (loss := loss_of(s, report)) is not None]
    return len(losses) > 1 and all(loss is not None and abs(loss - 1) < ALIKE for loss in losses)


def cost_rows(report: Report) -> tuple[CostRow, ...]:
    """What making and running each model took, with what was estimated beside it."""

    def largest(values: Sequence[float | None]) -> float:
        return max([v for v in values if v is not None], default=0) or 1

    made = [s for s in report.stages if s.artifact is not None or s.predicted_memory is not None]
    wall = largest([s.cost.wall_s for s in made])
    pairs = [(_making(s), _running(s, report)) for s in made]
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


def parameter(value: Any) -> str:
    """A parameter's value as YAML would take it in one line."""
    return json.dumps(value, ensure_ascii=False)


def breakable(name: str) -> Markup:
    """The name, escaped, with leave to break it behind its underscores."""
    return Markup("<wbr>").join(part for part in re.split(r"(?<=_)(?=[^_])", name))


def data_link(kind: str, text: str) -> str:
    """A `data:` address that holds the text itself."""
    return f"data:{kind};charset=utf-8;base64,{base64.b64encode(text.encode()).decode()}"


def _making(stage: StageReport) -> tuple[int | None, int | None]:
    predicted = stage.predicted_memory
    return stage.cost.peak_memory_bytes, predicted.conversion_bytes if predicted else None


def _running(stage: StageReport, report: Report) -> tuple[int | None, int | None]:
    predicted = stage.predicted_memory
    return measured_to_run(stage, report), predicted.inference_bytes if predicted else None
