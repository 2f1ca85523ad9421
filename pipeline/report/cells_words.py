"""What the report over the cells says in words and figures, the same in Markdown and in HTML."""

from __future__ import annotations

import math

from pipeline.report.cells_report import CellFigure, CellsReport, PointOverCells
from pipeline.report.figures import percent
from pipeline.report.schema import Ratio
from pipeline.report.time_chart import between, duration


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
    return duration(time.median), f"{between(time)}{mean}"


def speed_up(ratio: Ratio) -> str:
    """How much faster, in percent of the baseline's speed: `+1.4 %`."""
    return f"{signed(ratio.ratio)} %"


def speed_up_interval(ratio: Ratio) -> str:
    return f"{signed(ratio.low)} to {signed(ratio.high)} %"


def signed(ratio: float) -> str:
    """A ratio as a difference in percent; no end of an interval is rounded across zero or the default margin."""
    if not math.isfinite(ratio):
        return "∞"
    change = 100 * (ratio - 1)
    digits = 0 if abs(change) >= 100 else 1
    while digits < 4 and _crosses(change, round(change, digits)):
        digits += 1
    return f"{change:+,.{digits}f}".replace("-", "−")


def _crosses(exact: float, shown: float) -> bool:
    return any((exact - edge) * (shown - edge) <= 0 and exact != edge for edge in (-1.0, 0.0, 1.0))


def claim(figure: CellFigure) -> str:
    """The verdict with what limits it."""
    ratio = figure.vs_baseline
    if ratio is None:
        return ""
    if ratio.verdict == "inconclusive":
        return "inconclusive" + (
            f", about {ratio.rounds_to_decide} rounds would decide" if ratio.rounds_to_decide else ""
        )
    return ratio.verdict


def contradiction(figure: CellFigure) -> str | None:
    """Where a stage that changed nothing is found faster or slower: the figure cannot be the pass's doing."""
    ratio = figure.vs_baseline
    if figure.effect == "none" and ratio is not None and ratio.verdict in {"faster", "slower"}:
        return f"it changed nothing: whatever made it {ratio.verdict}, the pass did not"
    return None


def floor_in_words(floor: float | None) -> str:
    """The noise floor of a cell."""
    return "not known" if floor is None else percent(floor)


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
                said.append(f"{stage.name} {_changed([f for _, f in told])}{where}: {_found(told)}.")
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


def _found(told: list[tuple[str, CellFigure]]) -> str:
    if len(told) > FEW_CELLS:
        verdicts = [figure.vs_baseline.verdict for _, figure in told if figure.vs_baseline]
        return ", ".join(f"{word} in {verdicts.count(word)} cells" for word in dict.fromkeys(verdicts))
    return "; ".join(
        f"{speed_up(figure.vs_baseline)} in {label} ({figure.vs_baseline.verdict}"
        + (", inside the noise floor" if figure.vs_baseline.inside_floor else "")
        + ("; BROKEN" if figure.broken else "")
        + ")"
        for label, figure in told
        if figure.vs_baseline
    )
