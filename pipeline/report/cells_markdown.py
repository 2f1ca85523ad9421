"""The report over the cells as Markdown in GitHub's dialect."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.report import cells_words as words
from pipeline.report.cells_report import CellsReport, PointOverCells, floor_of
from pipeline.report.figures import megabytes
from pipeline.report.markdown import plain, table
from pipeline.report.printable import without_controls


def render_cells_markdown(report: CellsReport) -> str:
    """The whole page."""
    report = without_controls(report)
    parts = [_head(report), _cells(report), *(_point(point, report) for point in report.points)]
    return "\n\n".join("\n".join(part) for part in map(list, parts) if part) + "\n"


def _head(report: CellsReport) -> Iterator[str]:
    yield f"# {plain(report.recipe)}, all cells"
    if report.description:
        yield f"\n{plain(report.description)}"
    yield ""
    for line in words.headline(report):
        yield f"- {plain(line)}"
    threads = " and ".join(map(str, report.threads))
    where = f"Measured on {plain(report.host)}, {threads} threads. " if report.host else "Nothing was measured. "
    yield f"\n{where}{plain(report.id)}, {plain(report.created)}."


def _cells(report: CellsReport) -> Iterator[str]:
    yield "## Cells\n"
    rows = []
    for cell in report.cells:
        run = f"[{plain(cell.run.removeprefix('../'))}]({cell.run}/report.md)" if cell.run else "**none**"
        rounds = f"{cell.rounds} in {cell.launches}" if cell.rounds is not None else "–"
        rows.append(
            (str(cell.index), plain(cell.label), megabytes(cell.size_bytes), rounds, run, plain(cell.error or ""))
        )
    yield from table((">cell", "overrides", ">weights", ">rounds in launches", "run", "what went wrong"), rows)


def _point(point: PointOverCells, report: CellsReport) -> Iterator[str]:
    yield f"## {plain(words.point_title(point))}\n"
    yield "### Time: median, 95 % interval, mean of all blocks\n"
    labels = [f">{plain(cell.label)}" for cell in report.cells]
    times = []
    for stage in point.stages:
        cells = []
        for figure in stage.figures:
            median, below = words.time_in_words(figure)
            cells.append(f"{median} ({plain(below)})" if below else median)
        times.append((plain(stage.name), *cells))
    yield from table(("stage", *labels), times)
    yield f"\n### Speed against {plain(report.baseline)}, and what the stage changed\n"
    rows = []
    for stage in point.stages:
        if stage.is_baseline:
            continue
        cells = []
        for figure in stage.figures:
            ratio = figure.vs_baseline
            if ratio is None:
                cells.append(plain(figure.reason or "–"))
                continue
            told = [
                f"**{words.speed_up(ratio, report.margin)}**",
                f"({words.speed_up_interval(ratio, report.margin)})",
                words.claim(figure),
            ]
            told += ["**BROKEN**"] if figure.broken else []
            told += [plain(text) for text in (words.changed(figure), words.against_parent(figure, report)) if text]
            told += [f"**{plain(why)}**"] if (why := words.contradiction(figure)) else []
            cells.append("<br>".join(told))
        rows.append((plain(stage.name), *cells))
    floors = tuple(words.floor_in_words(floor_of(cell, point)) for cell in report.cells)
    counts = tuple(_rounds(point, i) for i in range(len(report.cells)))
    rows += [("*noise floor*", *floors), ("*rounds*", *counts)]
    yield from table(("stage", *(label.removeprefix(">") for label in labels)), rows)


def _rounds(point: PointOverCells, cell: int) -> str:
    return str(max((stage.figures[cell].rounds or 0 for stage in point.stages), default=0) or "–")
