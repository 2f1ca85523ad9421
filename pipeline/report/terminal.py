"""The report as tables in a terminal. Every figure with an interval shows it."""

from __future__ import annotations

import io

from rich import box
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from pipeline.report.figures import gate_value, megabytes, number, rate, rate_interval, seconds
from pipeline.report.schema import Interval, PlainRatio, Ratio, Report, StageReport
from pipeline.report.words import effect_in_words, headline, is_broken, sentence

STYLES = {
    "faster": "green",
    "slower": "red",
    "equivalent": "default",
    "inconclusive": "yellow",
    "identical": "green",
    "degraded": "yellow",
    "broken": "bold white on red",
    "passed": "green",
    "failed": "bold red",
    "not_evaluated": "yellow",
    "skipped": "yellow",
    "unmeasured": "yellow",
}


def render(report: Report, console: Console) -> None:
    """Print the whole report."""
    console.print()
    parts = [
        _head(report),
        _headline(report),
        _speed(report),
        _quality(report),
        _resources(report),
        _predictions(report),
        _changes(report),
        _in_words(report),
        _gates(report),
    ]
    for part in parts:
        if part is not None:
            console.print(part)
            console.print()


def render_text(report: Report, width: int = 120) -> str:
    """The whole report as plain text, without colours."""
    out = io.StringIO()
    render(report, Console(file=out, width=width, highlight=False, color_system=None))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def _head(report: Report) -> RenderableType:
    lines = [
        f"[bold]{escape(report.recipe)}[/]  {escape(report.description)}".rstrip(),
        f"measured on {escape(str(report.host.get('cpu_model')))}, {report.threads} threads; "
        f"target {escape(str(report.hardware.get('name')))}",
    ]
    if report.cell is not None:
        said = ", ".join(f"{key}={value}" for key, value in report.cell.overrides.items())
        lines.append(f"cell {report.cell.index} of a matrix of {report.cell.of}: {escape(said)}")
    lines += [f"note: {escape(note)}" for note in report.notes]
    return Text.from_markup("\n".join(lines))


def _headline(report: Report) -> RenderableType | None:
    lines = headline(report)
    return Text("\n".join(lines)) if lines else None


def _speed(report: Report) -> RenderableType | None:
    points = _points(report)
    if not points:
        return None
    tables: list[RenderableType] = []
    for kind, batch, prompt in points:
        here = [p for s in report.stages for p in s.speed or () if (p.kind, p.batch, p.prompt) == (kind, batch, prompt)]
        new = here[0].new_tokens
        what = f"prefill of {prompt} tokens" if kind == "prefill" else f"decode of {new} tokens after {prompt}"
        rounds, launches = max(p.rounds for p in here), max(p.launches for p in here)
        floor = next((f for f in report.noise_floor if (f.kind, f.batch, f.prompt) == (kind, batch, prompt)), None)
        noise = f"; {report.baseline} against itself {floor.ratio_low:.3f}–{floor.ratio_high:.3f}" if floor else ""
        counts = f"{rounds} rounds, {launches} launch{'es' if launches > 1 else ''}"
        title = f"{what}, batch {batch} ({counts}{noise})"
        table = _table("stage")
        for column in ("tokens/s", "95 %", f"× {report.baseline}", "95 %"):
            table.add_column(column, justify="right", overflow="fold")
        table.add_column("verdict")
        for stage in report.stages:
            point = next((p for p in stage.speed or () if (p.kind, p.batch, p.prompt) == (kind, batch, prompt)), None)
            if point is None:
                continue
            table.add_row(stage.name, *_rate(point.tokens_per_s), *_ratio(point.vs_baseline, stage, report))
        tables += [Text(""), _titled(title, table)] if tables else [_titled(title, table)]
    return Group(*tables)


def _quality(report: Report) -> RenderableType | None:
    scored = max((s.quality.tokens for s in report.stages if s.quality), default=0)
    if not scored:
        return None
    table = _table("stage")
    for column in ("perplexity", f"× {report.baseline}", "95 %", "KL", "top-1"):
        table.add_column(column, justify="right", overflow="fold")
    table.add_column("verdict")
    for stage in report.stages:
        if stage.quality is None:
            continue
        paired = stage.quality.vs_baseline
        table.add_row(
            stage.name,
            number(stage.quality.perplexity, ".3f"),
            *_plain_ratio(paired.perplexity_ratio if paired else None),
            number(paired.kl_divergence, ".2g") if paired else "–",
            number(paired.top1_agreement, ".1%") if paired else "–",
            _styled(paired.verdict) if paired else ("baseline" if stage.name == report.baseline else "–"),
        )
    return _titled(f"quality on {scored:,} held-out tokens", table)


def _resources(report: Report) -> RenderableType | None:
    if all(stage.artifact is None for stage in report.stages):
        return None
    table = _table("stage")
    for column in ("size", "load cold", "warm", "memory", "made in", "with memory", "adds to store"):
        table.add_column(column, justify="right", overflow="fold")
    for stage in report.stages:
        if stage.artifact is None:
            continue
        load = stage.load
        table.add_row(
            stage.name,
            megabytes(stage.artifact.size_bytes),
            seconds(load.cold_s if load else None),
            seconds(load.warm_s if load else None),
            megabytes(stage.inference_peak_memory_bytes),
            seconds(stage.cost.wall_s),
            megabytes(stage.cost.peak_memory_bytes),
            megabytes(stage.artifact.unique_bytes),
        )
    return _titled("what each model takes to run, and what it took to make", table)


def _changes(report: Report) -> RenderableType:
    table = _table("stage", "pass", "status", "what it changed")
    for stage in report.stages:
        table.add_row(stage.name, stage.pass_, _styled(stage.status), effect_in_words(stage))
    return _titled("stages", table)


def _in_words(report: Report) -> RenderableType:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(overflow="fold")
    table.add_column(overflow="fold", ratio=1)
    for stage in report.stages:
        style = STYLES["broken"] if is_broken(stage) else STYLES.get(stage.status, "default")
        log = f" (log: {escape(stage.log)})" if stage.log and stage.status in {"failed", "unmeasured"} else ""
        table.add_row(f"[{style}]{escape(stage.name)}[/]", escape(sentence(stage, report)) + log)
    return Group(Text("in words", style="bold"), table)


def _predictions(report: Report) -> RenderableType | None:
    if all(stage.predicted_memory is None for stage in report.stages):
        return None
    table = _table("stage")
    for column in ("to run: estimated", "measured", "to make: estimated", "measured"):
        table.add_column(column, justify="right", overflow="fold")
    table.add_column("target")
    for stage in report.stages:
        predicted = stage.predicted_memory
        if predicted is None:
            continue
        fits = {True: "fits", False: "does not fit", None: "–"}[predicted.fits]
        table.add_row(
            stage.name,
            megabytes(predicted.inference_bytes),
            megabytes(stage.inference_peak_memory_bytes),
            megabytes(predicted.conversion_bytes),
            megabytes(stage.cost.peak_memory_bytes),
            fits,
        )
    return _titled("memory, as estimated before anything ran, and as measured", table)


def _gates(report: Report) -> RenderableType | None:
    if not report.gates:
        return None
    table = _table("gate", "result")
    table.add_column("deciding value", justify="right")
    for gate in report.gates:
        table.add_row(escape(gate.gate), _styled(gate.result), gate_value(gate.observed))
    reasons = [f"{escape(g.gate)}: {escape(g.reason)}" for g in report.gates if g.reason]
    shown = _titled("gates", table)
    return Group(shown, Text.from_markup("\n".join(reasons))) if reasons else shown


def _points(report: Report) -> list[tuple[str, int, int]]:
    found: dict[tuple[str, int, int], None] = {}
    for stage in report.stages:
        for point in stage.speed or ():
            found[point.kind, point.batch, point.prompt] = None
    return list(found)


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")  # what does not fit goes on below, never to "…"
    return table


def _titled(title: str, table: Table) -> RenderableType:
    """The table under its title; rich would break a title to the table's width."""
    return Group(Text(title, style="bold"), table)


def _rate(figure: Interval) -> tuple[str, str]:
    return rate(figure.median), rate_interval(figure.median, figure)


def _ratio(ratio: Ratio | None, stage: StageReport, report: Report) -> tuple[str, str, str]:
    if ratio is None:
        return "–", "–", "baseline" if stage.name == report.baseline else "–"
    return f"{ratio.ratio:.2f}", f"{ratio.low:.2f}–{ratio.high:.2f}", _styled(ratio.verdict)


def _plain_ratio(ratio: PlainRatio | None) -> tuple[str, str]:
    if ratio is None:
        return "–", "–"
    if ratio.ratio is None or ratio.low is None or ratio.high is None:
        return "not finite", "–"
    return f"{ratio.ratio:.4f}", f"{ratio.low:.4f}–{ratio.high:.4f}"


def _styled(word: str) -> str:
    style = STYLES.get(word)
    return f"[{style}]{word}[/]" if style else word
