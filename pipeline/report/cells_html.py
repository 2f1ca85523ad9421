"""The report over the cells as one HTML file that needs nothing else: no script, no font, no image, no request."""

from __future__ import annotations

from typing import NamedTuple

from pipeline.report import cells_words as words
from pipeline.report import figures
from pipeline.report.cells_report import CellsReport, PointOverCells, floor_of
from pipeline.report.html import SYMBOLS, data_link
from pipeline.report.page import render_page
from pipeline.report.printable import without_controls
from pipeline.report.time_chart import TimeChart, time_chart


class PointPanel(NamedTuple):
    """One workload point: its chart, for wide and for narrow screens, and its tables."""

    number: int
    title: str
    point: PointOverCells
    wide: TimeChart | None
    narrow: TimeChart | None
    floors: tuple[str, ...]
    rounds: tuple[int, ...]


def render_cells_html(report: CellsReport) -> str:
    """The whole page."""
    exact, report = report, without_controls(report)
    return render_page(
        "cells.html.j2",
        report=report,
        words=words,
        figures=figures,
        symbols=SYMBOLS,
        headline=words.headline(report),
        panels=[_panel(i, point, report) for i, point in enumerate(report.points)],
        json_link=data_link("application/json", exact.to_json()),
    )


def _panel(number: int, point: PointOverCells, report: CellsReport) -> PointPanel:
    return PointPanel(
        number=number,
        title=words.point_title(point),
        point=point,
        wide=time_chart(report, point, width=920, height=430, font=14),
        narrow=time_chart(report, point, width=360, height=380, font=13),
        floors=tuple(words.floor_in_words(floor_of(cell, point)) for cell in report.cells),
        rounds=tuple(
            max((s.figures[i].rounds or 0 for s in point.stages), default=0) for i in range(len(report.cells))
        ),
    )
