"""What the report over the cells says in words and figures, the same in Markdown and in HTML."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pipeline.report.cells_report import CellFigure, CellsReport, PointOverCells
from pipeline.report.figures import MARGIN, duration, duration_interval, floor_in_table
from pipeline.report.schema import Ratio
from pipeline.report.verdicts import rounds_in_words


def point_title(point: PointOverCells) -> str:
    if point.kind == "forward":
        return f"Time of a pass over {point.batch} × {point.prompt:,} tokens"
    batch = f", batch {point.batch}" if point.batch != 1 else ""
    if point.kind == "decode":
        after = f" while {point.new_tokens:,} are decoded" if point.new_tokens else ""
        return f"Time per decoded token{after} after a prompt of {point.prompt:,}{batch}"
    return f"Time to the first token of a prompt of {point.prompt:,}{batch}"


def time_in_words(figure: CellFigure) -> tuple[str, str]:
    """(the median, what stands below it)."""
    time = figure.latency_s
    if time is None:
        return "–", figure.reason or ""
    mean = f"; mean {duration(figure.mean_s)}" if figure.mean_s is not None else ""
    return duration(time.median), f"{duration_interval(time.median, time)}{mean}"


def speed_up(ratio: Ratio, margin: float = MARGIN) -> str:
    """How much faster, in percent of the baseline's speed: `+1.4 %`."""
    return f"{signed(ratio.ratio, margin)} %"


def speed_up_interval(ratio: Ratio, margin: float = MARGIN) -> str:
    return f"{signed(ratio.low, margin)} to {signed(ratio.high, margin)} %"


def signed(ratio: float, margin: float = MARGIN) -> str:
    """A ratio as a difference in percent; no end of an interval is rounded across zero or an edge of the margin."""
    if not math.isfinite(ratio):
        return "∞"
    change = 100 * (ratio - 1)
    edges = (100 * (1 / (1 + margin) - 1), 0.0, 100 * margin)
    digits = 0 if abs(change) >= 100 else 1
    while digits < 4 and _crosses(change, round(change, digits), edges):
        digits += 1
    return f"{change:+,.{digits}f}".replace("-", "−")


def _crosses(exact: float, shown: float, edges: Sequence[float]) -> bool:
    """Whether it is shown on another side of an edge than it lies on."""
    return any((exact - edge) * (shown - edge) <= 0 and abs(exact - edge) > 1e-9 for edge in edges)


def claim(figure: CellFigure) -> str:
    """The verdict with what limits it."""
    ratio = figure.vs_baseline
    if ratio is None:
        return ""
    if ratio.verdict == "inconclusive":
        rounds = rounds_in_words(ratio)
        return "inconclusive" + (f", {rounds} rounds may decide" if rounds else "")
    return ratio.verdict


def changed(figure: CellFigure) -> str:
    """What the stage did to the model: `changed 0 of 192 nodes`; of another format, what it has: `503 nodes`."""
    if not figure.changed:
        return ""
    return figure.changed if figure.effect == "conversion" else f"changed {figure.changed}"


def against_parent(figure: CellFigure, report: CellsReport) -> str:
    """The speed over that of the stage that it was made from; empty where that is the baseline."""
    ratio = figure.vs_parent
    if ratio is None or figure.parent in {None, report.baseline}:
        return ""
    interval = speed_up_interval(ratio, report.margin)
    return f"{speed_up(ratio, report.margin)} ({interval}) against {figure.parent}: {ratio.verdict}"


def contradiction(figure: CellFigure) -> str | None:
    """Where a stage that changed nothing is timed faster or slower than the stage that it was made from."""
    ratio = figure.vs_parent
    if not figure.contradicted or ratio is None:
        return None
    return f"contradiction: it changed nothing: whatever made it {ratio.verdict} than {figure.parent}, the pass did not"


def floor_in_words(floor: float | None) -> str:
    """The noise floor of a cell."""
    return floor_in_table(floor)


FEW_CELLS = 4
"""Of more cells the headline tells the number of each verdict instead of every figure."""


def headline(report: CellsReport) -> list[str]:
    """A sentence for each stage at each workload point: what it changed, and what was found in which cell."""
    said = []
    for point in report.points:
        for stage in point.stages:
            told = [
                (cell.label, figure)
                for cell, figure in zip(report.cells, stage.figures, strict=True)
                if figure.vs_baseline is not None
            ]
            if told:
                where = f", {point.kind}" if len(report.points) > 1 else ""
                said.append(f"{stage.name} {_changed([f for _, f in told])}{where}: {_found(told, report)}.")
    if len(report.cells) < report.of:
        said.insert(0, f"Not complete: {len(report.cells)} of {report.of} cells have been run.")
    failed = [cell.label for cell in report.cells if cell.error is not None]
    if failed:
        said.append(f"{len(failed)} of {len(report.cells)} cells failed in whole or in part: {'; '.join(failed)}.")
    return said


def _changed(figures: list[CellFigure]) -> str:
    counts = list(dict.fromkeys(figure.changed for figure in figures if figure.changed))
    if all(figure.effect == "none" for figure in figures):
        return f"changed nothing ({' and '.join(counts)})" if counts else "changed nothing"
    return (
        f"({'; '.join(counts)})" if len(counts) == 1 else "(changed the model)" if counts else "(the model as it came)"
    )


def _found(told: list[tuple[str, CellFigure]], report: CellsReport) -> str:
    contradicted = sum(figure.contradicted for _, figure in told)
    if len(told) > FEW_CELLS:
        verdicts = [figure.vs_baseline.verdict for _, figure in told if figure.vs_baseline]
        counts = [f"{word} in {verdicts.count(word)} cells" for word in dict.fromkeys(verdicts)]
        if contradicted:
            counts.append(f"CONTRADICTION in {contradicted}, for there it changed nothing")
        return ", ".join(counts)
    return "; ".join(_found_in(label, figure, report) for label, figure in told)


def _found_in(label: str, figure: CellFigure, report: CellsReport) -> str:
    """What was found in one cell. What changed nothing is held against the stage that it was made from."""
    ratio, against = figure.vs_baseline, ""
    if figure.effect == "none" and figure.vs_parent is not None and figure.parent != report.baseline:
        ratio, against = figure.vs_parent, f" against {figure.parent}"
    if ratio is None:
        return f"not known in {label}"
    said = [f"CONTRADICTION: timed {ratio.verdict}" if figure.contradicted else ratio.verdict]
    if ratio.inside_floor:
        said[0] += ", reaches into the noise floor"
    if figure.broken:
        said.append("BROKEN")
    return f"{speed_up(ratio, report.margin)}{against} in {label} ({'; '.join(said)})"
