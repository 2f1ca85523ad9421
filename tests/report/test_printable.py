"""Control characters in strangers' names reach no terminal and no page."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from every_case import rich_report
from rich.console import Console

from pipeline.report.cells_html import render_cells_html
from pipeline.report.cells_markdown import render_cells_markdown
from pipeline.report.cells_report import CellOutcome, CellsReport, build_cells_report
from pipeline.report.comparison import Comparison
from pipeline.report.comparison_html import render_comparison_html
from pipeline.report.comparison_markdown import render_comparison_markdown
from pipeline.report.comparison_terminal import render_comparison
from pipeline.report.figures import printable
from pipeline.report.html import render_html
from pipeline.report.markdown import render_markdown
from pipeline.report.printable import without_controls
from pipeline.report.schema import Cell, Report
from pipeline.report.terminal import render_text

EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202edlrow\x7f\r"
RAW = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]")


def evil(value: Any) -> Any:
    """The value with control characters at the end of all words that a stranger may have written."""
    if isinstance(value, dict):
        told = {"reason", "description", "source", "log", "sample_text", "cpu_model", "gate", "notes", "params"}
        return {key: _evil(v) if key in told else evil(v) for key, v in value.items()} | (
            {f"Op{EVIL}": [1, 2]} if value and all(isinstance(v, list) for v in value.values()) else {}
        )
    return [evil(v) for v in value] if isinstance(value, list) else value


def _evil(value: Any) -> Any:
    if isinstance(value, str):
        return value + EVIL
    if isinstance(value, list):
        return [_evil(v) for v in value]
    return {f"{k}{EVIL}": _evil(v) for k, v in value.items()} if isinstance(value, dict) else value


def evil_report() -> Report:
    data = evil(json.loads(rich_report().to_json()))
    data["stages"][3]["effect"]["region"]["before"][0]["operator"] += EVIL
    return Report.model_validate(data)


def cells(report: Report) -> CellsReport:
    cell = Cell(index=0, of=1, overrides={f"x{EVIL}": EVIL})
    return build_cells_report(
        [CellOutcome(cell=cell, exit_code=0, report=report, run="../r", error=EVIL)],
        recipe="r",
        description=EVIL,
        baseline="source",
        identity="id",
        created="2026-01-01T00:00:00+00:00",
        exit_code=0,
    )


def comparison() -> Comparison:
    run = {"folder": f"/x{EVIL}", "recipe": "r", "run": "id", "created": "now", "host": EVIL, "model": EVIL}
    stage = {"name": f"s{EVIL}", "same_artifact": False, "a_digest": None, "b_digest": None, "status": "absent"}
    return Comparison.model_validate(
        {"id": "id", "created": "now", "a": run, "b": run, "notes": [EVIL], "host": {"cpu_model": EVIL}}
        | {"forced": [{"what": "model", "a": EVIL, "b": "b"}], "threads": [1, 1], "baseline": None, "budget_s": 1}
        | {"margin": 0.01, "stages": [{**stage, "reason": EVIL, "size_bytes": [1, 2]}], "only_in_a": [EVIL]}
    )


def in_terminal(found: Comparison) -> str:
    out = io.StringIO()
    render_comparison(found, Console(file=out, width=300, highlight=False, color_system=None))
    return out.getvalue()


@pytest.mark.parametrize(
    "render",
    [
        lambda: render_text(evil_report(), 200),
        lambda: render_markdown(evil_report()),
        lambda: render_html(evil_report()),
        lambda: render_cells_markdown(cells(evil_report())),
        lambda: render_cells_html(cells(evil_report())),
        lambda: render_comparison_markdown(comparison()),
        lambda: render_comparison_html(comparison()),
        lambda: in_terminal(comparison()),
    ],
    ids=["terminal", "markdown", "html", "cells.md", "cells.html", "comparison.md", "comparison.html", "comparison"],
)
def test_no_renderer_prints_a_control_character(render: Callable[[], str]) -> None:
    page = render()
    assert RAW.search(page) is None
    assert "owned" in page


def test_what_has_none_stays_as_it_is() -> None:
    report = rich_report()
    assert without_controls(report) == report


def test_a_control_character_is_written_out_and_lines_and_letters_stay() -> None:
    assert printable("a\x1b[31m\x9b\u202e") == r"a\x1b[31m\x9b\u202e"
    for text in ("a line\nand\tanother", "größer × 1.2–1.3", "日本", "👍🏽"):
        assert printable(text) == text


def test_a_floor_that_says_nothing_is_no_figure() -> None:
    report = rich_report()
    wild = tuple(f.model_copy(update={"ratio_low": 7e-7, "ratio_high": 1.4e6}) for f in report.noise_floor)
    wild_report = report.model_copy(update={"noise_floor": wild})
    for page in (render_text(wild_report), render_markdown(wild_report), render_html(wild_report)):
        assert not re.search(r"\d,\d{3}(\.\d+)? %|1400000|142,", page)
        assert "no usable" in " ".join(page.split())
