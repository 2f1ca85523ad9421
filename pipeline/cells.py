"""One report over all cells of a recipe's matrix, beside the reports of their runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from pipeline.measure.samples import SpeedMeasurement
from pipeline.recipe import Recipe
from pipeline.report.cells_html import render_cells_html
from pipeline.report.cells_markdown import render_cells_markdown
from pipeline.report.cells_report import CellOutcome, CellsReport, Means, build_cells_report
from pipeline.run import RunResult
from pipeline.run_folder import new_id

CELLS_JSON = "cells.json"
CELLS_MARKDOWN = "cells.md"
CELLS_HTML = "cells.html"


def outcome_of(recipe: Recipe, result: RunResult) -> CellOutcome:
    """What became of a cell that ran."""
    if recipe.cell is None:
        raise ValueError("the recipe has no matrix")
    return CellOutcome(
        cell=recipe.cell,
        exit_code=result.exit_code,
        report=result.report,
        run=f"../{result.folder.name}",
        means=_means(result.folder),
    )


class CellsFolder:
    """The folder `runs/NAME/cells-ID` of a report over cells, which is there from the first cell on.

    Each time it is written, whoever looks finds the files of before or those of now, whole, the page last but one and
    cells.json last: what ends a run between two cells leaves the report over those that ran.
    """

    def __init__(self, recipe: Recipe, runs: Path) -> None:
        self._recipe = recipe
        self._id = new_id()
        self.path = runs / recipe.name / f"cells-{self._id}"

    def write(self, outcomes: Sequence[CellOutcome], *, exit_code: int) -> None:
        """Write cells.html, .md and .json over the cells that have been run so far.

        Raises: OSError where they cannot be written.
        """
        report = build_cells_report(
            outcomes,
            recipe=self._recipe.name,
            description=self._recipe.description,
            baseline=self._recipe.evaluate.baseline,
            identity=self._id,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            exit_code=exit_code,
        )
        aside = self.path.with_name(f".{self.path.name}")
        aside.mkdir(parents=True)
        try:
            _write(report, aside)
            if not self.path.exists():
                aside.rename(self.path)
                return
            for name in (CELLS_MARKDOWN, CELLS_HTML, CELLS_JSON):
                (aside / name).replace(self.path / name)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def _write(report: CellsReport, folder: Path) -> None:
    (folder / CELLS_MARKDOWN).write_text(render_cells_markdown(report), encoding="utf-8")
    (folder / CELLS_HTML).write_text(render_cells_html(report), encoding="utf-8")
    (folder / CELLS_JSON).write_text(report.to_json(), encoding="utf-8")


def _means(folder: Path) -> Means:
    """Mean seconds of all blocks of each stage at each point, outliers among them; none without samples."""
    file = folder / "samples.json"
    if not file.is_file():
        return {}
    try:
        seen = SpeedMeasurement.model_validate(json.loads(file.read_text(encoding="utf-8"))).samples
    except (ValueError, ValidationError):  # cut, or of another version: the medians are in the report
        return {}
    sums: dict[tuple[str, tuple[str, int, int, int | None]], list[float]] = {}
    for sample in seen:
        if sample.replica == 0:
            at = sample.point
            key = (sample.stage, (at.kind, at.batch, at.prompt, at.new_tokens or None))
            sums.setdefault(key, []).append(sample.latency_s)
    return {key: sum(values) / len(values) for key, values in sums.items()}  # type: ignore[misc]
