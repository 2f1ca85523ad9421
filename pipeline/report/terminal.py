"""The report as tables in a terminal. Every figure with an interval shows it."""

from __future__ import annotations

import io
from collections.abc import Callable

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table as Grid
from rich.text import Text

from pipeline.report.columns import Column, name_lines, table
from pipeline.report.effects import effect_in_words
from pipeline.report.figures import (
    duration,
    duration_interval,
    finer_interval,
    finer_times,
    floor_interval,
    gate_value,
    megabytes,
    number,
    percent,
    rate,
    rate_interval,
    seconds,
    times,
    times_interval,
)
from pipeline.report.machines import measured_on, measured_to_run
from pipeline.report.points import TIME_WORDS, point_in_words, points_of, timed_at
from pipeline.report.printable import without_controls
from pipeline.report.schema import Report, Speed, StageReport
from pipeline.report.tables import Table as Figures
from pipeline.report.tables import ablation_table, roofline_table
from pipeline.report.verdicts import (
    RATIO_NOTE,
    counts_in_words,
    is_contradicted,
    margin_of,
    schedule_in_words,
    undecided_in_words,
)
from pipeline.report.words import (
    earned_back,
    has_random_weights,
    headline,
    is_broken,
    is_extra,
    reason_to_tell,
    sentence,
    short_flag,
)

STYLES = {
    "faster": "green",
    "slower": "red",
    "equivalent": "default",
    "inconclusive": "yellow",
    "contradiction": "yellow",
    "identical": "green",
    "degraded": "yellow",
    "broken": "bold white on red",
    "passed": "green",
    "failed": "bold red",
    "not_evaluated": "yellow",
    "skipped": "yellow",
    "unmeasured": "yellow",
}


NARROW = 100
"""Columns below which a figure's interval stands under it and not beside it."""

Part = Callable[[Report, int], RenderableType | None]


def render(report: Report, console: Console) -> None:
    """Print the whole report."""
    report = without_controls(report)
    console.print()
    parts: tuple[Part, ...] = (
        _head,
        _headline,
        _changes,
        _speed,
        _quality,
        _roofline,
        _ablation,
        _resources,
        _predictions,
        _in_words,
        _gates,
    )
    for part in parts:
        shown = part(report, console.width)
        if shown is not None:
            console.print(shown)
            console.print()


def render_text(report: Report, width: int = 120) -> str:
    """The whole report as plain text, without colours."""
    out = io.StringIO()
    render(report, Console(file=out, width=width, highlight=False, color_system=None))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def _head(report: Report, width: int) -> RenderableType:
    lines = [
        f"[bold]{escape(report.recipe)}[/]  {escape(report.description)}".rstrip(),
        f"measured on {escape(measured_on(report))}, {report.threads} threads; "
        f"target {escape(str(report.hardware.get('name')))}",
    ]
    if report.cell is not None:
        said = ", ".join(f"{key}={value}" for key, value in report.cell.overrides.items())
        lines.append(f"cell {report.cell.index} of a matrix of {report.cell.of}: {escape(said)}")
    lines += [f"note: {escape(note)}" for note in report.notes]
    return Text.from_markup("\n".join(lines))


def _headline(report: Report, width: int) -> RenderableType | None:
    lines = headline(report)
    return Text("\n".join(lines)) if lines else None


def _speed(report: Report, width: int) -> RenderableType | None:
    points = points_of(report)
    if not points:
        return None
    parts: list[RenderableType] = []
    if report.schedule is not None:
        parts += [Text(schedule_in_words(report.schedule)), Text("")]
    for point in points:
        parts += [_speeds_at(point, report, width), Text("")]
    return Group(*parts, Text(RATIO_NOTE, style="dim"))


def _speeds_at(point: Speed, report: Report, width: int) -> RenderableType:
    """All stages at one workload point."""
    here = list(timed_at(report, point))
    floor = report.floor_at(point)
    noise = (
        f"{report.baseline} against itself {floor_interval(floor.ratio_low, floor.ratio_high)}"
        if floor
        else f"{report.baseline} did not run against itself, so nothing is claimed"
    )
    narrow = width < NARROW
    time = TIME_WORDS[point.kind]
    told_alone = "tokens/s" if point.kind == "forward" else time  # its interval is that of the other one
    shown = [n for n in ("tokens/s", time) if not (narrow and n == told_alone)]
    shown.append(f"×\u00a0{report.baseline}")
    columns = [Column("stage")]
    for name in shown:
        columns += [Column(name)] if narrow or name == told_alone else [Column(name), Column("95 %")]
    columns.append(Column("verdict", "words"))
    for stage, own in here:
        cells = [name_lines(stage.name, width // (4 if narrow else 6))]
        pairs = _speed_cells(own, report)
        for name in shown:
            pair = pairs[name]
            cells += ["\n".join(dict.fromkeys(pair))] if narrow else pair[: 1 if name == told_alone else 2]
        _add(columns, *cells, _verdict(stage, own, report))
    title = f"{point_in_words(point)} ({counts_in_words([p for _, p in here])}; {noise})"
    flagged = [f"{s.name} {p.outliers} of {p.rounds}" for s, p in here if p.outliers]
    parts: list[RenderableType] = [_titled(title, table(columns, width))]
    parts += map(Text, undecided_in_words([(stage.name, own) for stage, own in here], report))
    if flagged:
        parts.append(Text(f"blocks far from the others, which count all the same: {', '.join(flagged)}"))
    return Group(*parts)


def _speed_cells(point: Speed, report: Report) -> dict[str, tuple[str, str]]:
    """Figures and their intervals by the names of their columns."""
    speed, time, ratio = point.tokens_per_s, point.latency_s, point.vs_baseline
    over = (times(ratio.ratio), times_interval(ratio.ratio, ratio, margin_of(report))) if ratio else ("–", "–")
    return {
        "tokens/s": (rate(speed.median), rate_interval(speed.median, speed)),
        TIME_WORDS[point.kind]: (duration(time.median), duration_interval(time.median, time)),
        f"×\u00a0{report.baseline}": over,
    }


def _verdict(stage: StageReport, point: Speed, report: Report) -> str:
    """The verdict, and what speaks against believing or using it."""
    if point.vs_baseline is None:
        return "baseline" if stage.name == report.baseline else "–"
    words = [_styled(point.vs_baseline.verdict)]
    if is_contradicted(stage, point, report):
        words.append("[yellow]contradiction: it changed nothing[/]")
    if is_broken(stage):
        words.append(_styled("broken"))
    if flag := short_flag(stage):
        words.append(f"[bold red]{escape(flag)}[/]")
    return ", ".join(words)


def _quality(report: Report, width: int) -> RenderableType | None:
    scored = max((s.quality.tokens for s in report.stages if s.quality), default=0)
    if not scored:
        return None
    random = has_random_weights(report)
    names = ("KL", "top-1") if random else ("perplexity", f"×\u00a0{report.baseline}", "95 %", "KL", "top-1")
    columns = [Column("stage"), *map(Column, names), Column("verdict", "words")]
    for stage in report.stages:
        if stage.quality is None:
            continue
        paired = stage.quality.vs_baseline
        ratio = paired.perplexity_ratio if paired else None
        perplexity = (
            number(stage.quality.perplexity, ".3f"),
            finer_times(ratio.ratio) if ratio else "–",
            finer_interval(ratio.ratio, ratio) if ratio else "–",
        )
        verdict = "baseline" if stage.name == report.baseline else "–"
        if paired:
            verdict = _styled(paired.verdict) + (f": {escape(why)}" if (why := reason_to_tell(paired)) else "")
        _add(
            columns,
            name_lines(stage.name, width // 4),
            *(() if random else perplexity),
            number(paired.kl_divergence, ".2g") if paired else "–",
            percent(paired.top1_agreement) if paired else "–",
            verdict,
        )
    if random:
        title = f"agreement with {report.baseline} on {scored:,} tokens (random weights: perplexity means nothing)"
    else:
        title = f"quality on {scored:,} held-out tokens"
    return _titled(title, table(columns, width))


def _roofline(report: Report, width: int) -> RenderableType | None:
    found = roofline_table(report)
    return None if found is None else _figures(found, width)


def _ablation(report: Report, width: int) -> RenderableType | None:
    found = ablation_table(report)
    return None if found is None else _figures(found, width)


def _figures(found: Figures, width: int) -> RenderableType:
    """A table of words under its title and above its note."""
    columns = [Column(n.removeprefix(">"), "figure" if n.startswith(">") else "words") for n in found.header]
    columns[0].kind = "figure"  # names keep the lines that they are given
    for first, *cells in found.rows:
        _add(columns, name_lines(first, width // 4), *map(escape, cells))
    shown = _titled(found.title[:1].lower() + found.title[1:], table(columns, width))
    return Group(shown, Text(found.note, style="dim"))


def _resources(report: Report, width: int) -> RenderableType | None:
    if all(stage.artifact is None for stage in report.stages):
        return None
    device = any(s.device_peak_memory_bytes is not None for s in report.stages)
    earned = any(s.break_even is not None for s in report.stages)
    running = ["size", "load cold", "warm", "memory", *(["on device"] if device else [])]
    making = ["made in", "with memory", "adds to store", *(["earned back after"] if earned else [])]
    columns = [Column(name) for name in ("stage", *running, *making)]
    for stage in report.stages:
        if stage.artifact is None:
            continue
        load = stage.load
        _add(
            columns,
            name_lines(stage.name, width // 4),
            megabytes(stage.artifact.size_bytes),
            seconds(load.cold_s if load else None),
            seconds(load.warm_s if load else None),
            megabytes(stage.inference_peak_memory_bytes),
            *([megabytes(stage.device_peak_memory_bytes)] if device else []),
            seconds(stage.cost.wall_s),
            megabytes(stage.cost.peak_memory_bytes),
            megabytes(stage.artifact.unique_bytes),
            *([earned_back(stage.break_even)] if earned else []),
        )
    return _titled("what each model takes to run, and what it took to make", table(columns, width))


def _changes(report: Report, width: int) -> RenderableType:
    columns = [Column("stage"), Column("pass", "left"), Column("status", "left"), Column("what it changed", "words")]
    for stage in report.stages:
        names = (name_lines(stage.name, width // 4), name_lines(stage.pass_, width // 4))
        alone = "; made for the ablation alone" if is_extra(stage, report) else ""
        _add(
            columns,
            *names,
            _styled(stage.status) + (", exported" if stage.name == report.export else ""),
            escape(effect_in_words(stage)) + alone,
        )
    return _titled("stages", table(columns, width))


def _in_words(report: Report, width: int) -> RenderableType:
    told = Grid.grid(padding=(0, 1))
    for stage in report.stages:
        style = STYLES["broken"] if is_broken(stage) else STYLES.get(stage.status, "default")
        log = f" (log: {stage.log})" if stage.log and stage.status in {"failed", "unmeasured"} else ""
        words = Text(sentence(stage, report) + log)
        words.highlight_words([stage.name], style if style != "default" else "bold")
        told.add_row("-", words)
    return Group(Text("in words", style="bold"), told)


def _predictions(report: Report, width: int) -> RenderableType | None:
    if all(stage.predicted_memory is None for stage in report.stages):
        return None
    names = ("stage", "to run: estimated", "measured", "to make: estimated", "measured")
    columns = [*map(Column, names), Column("target", "words")]
    for stage in report.stages:
        predicted = stage.predicted_memory
        if predicted is None:
            continue
        fits = {True: "fits", False: "does not fit", None: "–"}[predicted.fits]
        _add(
            columns,
            name_lines(stage.name, width // 4),
            megabytes(predicted.inference_bytes),
            megabytes(measured_to_run(stage, report)),
            megabytes(predicted.conversion_bytes),
            megabytes(stage.cost.peak_memory_bytes),
            fits,
        )
    return _titled("memory, as estimated before anything ran, and as measured", table(columns, width))


def _gates(report: Report, width: int) -> RenderableType | None:
    if not report.gates:
        return None
    columns = [Column("gate", "words"), Column("result", "left"), Column("deciding value")]
    for gate in report.gates:
        _add(columns, escape(gate.gate), _styled(gate.result), gate_value(gate.observed))
    reasons = [f"{escape(g.gate)}: {escape(g.reason)}" for g in report.gates if g.reason]
    shown = _titled("gates", table(columns, width))
    return Group(shown, Text.from_markup("\n".join(reasons))) if reasons else shown


def _add(columns: list[Column], *cells: str) -> None:
    for column, cell in zip(columns, cells, strict=True):
        column.cells.append(cell)


def _titled(title: str, shown: RenderableType) -> RenderableType:
    """A table under its title; rich would break a title to the table's width."""
    return Group(Text(title, style="bold"), shown)


def _styled(word: str) -> str:
    style = STYLES.get(word)
    return f"[{style}]{word}[/]" if style else word
