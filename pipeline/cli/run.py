"""`pipeline run`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.options import ForceOption, JsonOption, OnlyOption, RecipeArgument, SetOption, UntilOption


def run_verb(
    recipe: RecipeArgument,
    set_: SetOption = None,
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

    Makes the stages that are not in the store, measures all, and writes runs/NAME/ID/report.json.
    """
    from pipeline.cli.live import LiveDisplay
    from pipeline.cli.output import console, print_json
    from pipeline.recipe import load_recipe
    from pipeline.report.terminal import render
    from pipeline.run import run

    loaded = load_recipe(recipe, set_ or [])
    with LiveDisplay() as display:
        result = run(loaded, until=until, only=only, measure=not no_measure, force=force, runs=runs, events=display)
    if json:
        print_json(result.report.model_dump(mode="json", by_alias=True))
    else:
        render(result.report, console())
        typer.echo(f"report: {result.folder / 'report.json'}")
        if result.report.export:
            typer.echo(f"model:  {result.folder / 'model'}  ({result.report.export})")
    return result.exit_code
