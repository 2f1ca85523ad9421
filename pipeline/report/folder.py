"""Finding and reading the report of a run."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from pipeline.errors import RecipeError, did_you_mean
from pipeline.report.schema import Report

REPORT = "report.json"
MARKDOWN = "report.md"
HTML = "report.html"
LATEST = "latest"


def write_report(report: Report, folder: Path) -> None:
    """Write report.md, report.html and, last of all, report.json: a folder that has it is complete.

    Raises: OSError where the folder cannot be written.
    """
    from pipeline.report.html import render_html
    from pipeline.report.markdown import render_markdown

    (folder / MARKDOWN).write_text(render_markdown(report), encoding="utf-8")
    (folder / HTML).write_text(render_html(report), encoding="utf-8")
    (folder / REPORT).write_text(report.to_json(), encoding="utf-8")


def find_run(run: str, runs: Path) -> Path:
    """The folder of a run, given as a folder or as the name of a recipe, whose latest run is meant.

    Raises: RecipeError where there is none.
    """
    given = Path(run).parent if Path(run).name == REPORT else Path(run)
    for folder in (given, runs / run / LATEST, runs / run):
        if (folder / REPORT).is_file():
            return folder
    known = [p.parent.parent.name for p in runs.glob(f"*/{LATEST}/{REPORT}")] if runs.is_dir() else []
    raise RecipeError(f"there is no run {run}", hint=did_you_mean(run, known, noun=f"recipes with runs in {runs}"))


def read_report(run: str, runs: Path) -> Report:
    """Raises: RecipeError where there is none, or it is of another version or damaged."""
    path = find_run(run, runs) / REPORT
    try:
        return Report.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(p) for p in first["loc"])
        raise RecipeError(f"{path} is not a report that this version reads: {where}: {first['msg']}") from None
