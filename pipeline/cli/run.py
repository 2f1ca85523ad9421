"""`pipeline run`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.cli.options import CellOption, ForceOption, JsonOption, OnlyOption, RecipeArgument, SetOption, UntilOption


def run_verb(
    recipe: RecipeArgument,
    set_: SetOption = None,
    cell: CellOption = None,
    until: UntilOption = None,
    only: OnlyOption = None,
    no_measure: Annotated[
        bool, typer.Option("--no-measure", help="Run the passes; print only what was measured before.")
    ] = False,
    force: ForceOption = False,
    runs: Annotated[Path, typer.Option("--runs", help="Folder for the runs' results.")] = Path("runs"),
    json: JsonOption = False,
) -> int:
    """Run a recipe and report on every stage.

    Makes the stages that are not in the store, measures all, and writes runs/NAME/ID/report.html, .md and .json.
    """
    from pipeline.cli.cells import chosen_recipes, for_each_cell
    from pipeline.cli.live import LiveDisplay
    from pipeline.cli.output import console
    from pipeline.recipe import Recipe
    from pipeline.report.folder import HTML, MARKDOWN, REPORT
    from pipeline.report.terminal import render
    from pipeline.run import run

    def run_one(loaded: Recipe) -> tuple[int, Any]:
        with LiveDisplay() as display:
            result = run(loaded, until=until, only=only, measure=not no_measure, force=force, runs=runs, events=display)
        if not json:
            render(result.report, console())
            typer.echo(f"report: {result.folder / HTML}  ({MARKDOWN}, {REPORT})")
            if result.report.export:
                typer.echo(f"model:  {result.folder / 'model'}  ({result.report.export})")
        return result.exit_code, result.report.model_dump(mode="json", by_alias=True)

    return for_each_cell(chosen_recipes(recipe, set_, cell), cell, run_one, json=json)
