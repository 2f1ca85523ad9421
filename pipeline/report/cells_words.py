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
    return duration(time.median), f"{between(time.low, time.high)}{mean}"


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


def headline(report: CellsReport) -> list[str]:
    """A sentence for each stage at each workload point: in how many cells it was found what, and what it changed."""
    said = []
    for point in report.points:
        for stage in point.stages:
            ratios = [f for f in stage.figures if f.vs_baseline is not None]
            if not ratios:
                continue
            verdicts = [f.vs_baseline.verdict for f in ratios if f.vs_baseline]
            counts = ", ".join(
                f"{verdict} in {verdicts.count(verdict)}" for verdict in dict.fromkeys(verdicts)
            )  # in the order of the cells
            nothing = all(f.effect == "none" for f in ratios)
            what = f"changed nothing ({ratios[0].changed})" if nothing else "changed the model"
            told = "; ".join(f"{speed_up(f.vs_baseline)}" for f in ratios if f.vs_baseline)
            where = point.kind if len(report.points) > 1 else ""
            cells = f"of {len(ratios)} cell{'s' if len(ratios) != 1 else ''}"
            said.append(f"{stage.name} {what}: {where + ' ' if where else ''}{counts} {cells} ({told}).")
    failed = [c for c in report.cells if c.run is None]
    if failed:
        names = ", ".join(c.label for c in failed)
        said.append(f"{len(failed)} of {len(report.cells)} cells did not run: {names}.")
    return said
