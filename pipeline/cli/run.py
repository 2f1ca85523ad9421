"""`pipeline run`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.cli.options import (
    AllowCodeOption,
    CellOption,
    ForceOption,
    JsonOption,
    OnlyOption,
    RecipeArgument,
    SetOption,
    UntilOption,
)


def run_verb(
    recipe: RecipeArgument,
    stage: Annotated[
        str | None,
        typer.Argument(metavar="[STAGE]", help="With --ablate: the end of the chain. Default: the exported stage."),
    ] = None,
    set_: SetOption = None,
    cell: CellOption = None,
    until: UntilOption = None,
    only: OnlyOption = None,
    ablate: Annotated[
        bool,
        typer.Option("--ablate", help="Also make the chain that ends in STAGE without each of its passes in turn."),
    ] = False,
    no_measure: Annotated[
        bool, typer.Option("--no-measure", help="Run the passes; print only what was measured before.")
    ] = False,
    force: ForceOption = False,
    allow_code: AllowCodeOption = False,
    runs: Annotated[Path, typer.Option("--runs", help="Folder for the runs' results.")] = Path("runs"),
    json: JsonOption = False,
) -> int:
    """Run a recipe and report on every stage.

    Makes the stages that are not in the store, measures all, and writes runs/NAME/ID/report.html, .md and .json. With
    --cell all also one report over all cells, runs/NAME/cells-ID/cells.html, .md and .json.
    """
    from pipeline.ablation import end_of_chain
    from pipeline.cells import CELLS_HTML, CELLS_JSON, CELLS_MARKDOWN, CellsFolder, outcome_of
    from pipeline.cli.cells import ALL, chosen_recipes, for_each_cell, worst
    from pipeline.cli.live import LiveDisplay
    from pipeline.cli.output import console
    from pipeline.errors import PipelineError, RecipeError
    from pipeline.recipe import Recipe
    from pipeline.report.cells_report import CellOutcome
    from pipeline.report.folder import HTML, MARKDOWN, REPORT
    from pipeline.report.terminal import render
    from pipeline.run import RunResult, run

    if stage is not None and not ablate:
        raise RecipeError(
            f"a second argument, {stage!r}, goes with --ablate only", hint=f"--only {stage} runs one stage"
        )
    recipes = chosen_recipes(recipe, set_, cell)
    outcomes: list[CellOutcome] = []
    over_cells = CellsFolder(recipes[0], runs) if cell == ALL and recipes[0].cell is not None else None

    def keep(outcome: CellOutcome) -> None:
        """The report over the cells is written after each: what ends the next one leaves it whole."""
        outcomes.append(outcome)
        if over_cells is not None:
            over_cells.write(outcomes, exit_code=worst(each.exit_code for each in outcomes))

    def run_whole(loaded: Recipe) -> RunResult:
        with LiveDisplay() as display:
            return run(
                loaded,
                until=until,
                only=only,
                ablate=end_of_chain(loaded, stage) if ablate else None,
                measure=not no_measure,
                force=force,
                allow_code=allow_code,
                runs=runs,
                events=display,
            )

    def run_one(loaded: Recipe) -> tuple[int, Any]:
        try:
            result = run_whole(loaded)
        except PipelineError as error:
            if loaded.cell is not None:
                keep(CellOutcome(cell=loaded.cell, exit_code=error.exit_code, error=str(error)))
            raise
        if loaded.cell is not None:
            keep(outcome_of(loaded, result))
        if not json:
            render(result.report, console())
            typer.echo(f"report: {result.folder / HTML}  ({MARKDOWN}, {REPORT})")
            if result.report.export:
                typer.echo(f"model:  {result.folder / 'model'}  ({result.report.export})")
        return result.exit_code, result.report.model_dump(mode="json", by_alias=True)

    code = for_each_cell(recipes, cell, run_one, json=json)
    if over_cells is not None:
        typer.echo(f"all cells: {over_cells.path / CELLS_HTML}  ({CELLS_MARKDOWN}, {CELLS_JSON})", err=json)
    return code
