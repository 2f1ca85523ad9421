"""`pipeline why`"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from pipeline.cli.options import CellOption, JsonOption, RecipeArgument, SetOption

MEANINGS = {
    "code": "the source code of the pass",
    "environment.engine": "the source code through which pipeline reads and writes artifacts",
}
"""What ingredients are whose names and digests alone say little."""


def why_verb(
    recipe: RecipeArgument,
    stage: Annotated[str, typer.Argument(metavar="STAGE", help="A stage of the recipe.")],
    set_: SetOption = None,
    cell: CellOption = None,
    json: JsonOption = False,
) -> int:
    """Say why a stage is cached or has to run.

    Compares the stage's key with that of the most similar run that the store remembers.
    """
    from pipeline.cli.cells import chosen_recipes, for_each_cell
    from pipeline.recipe import Recipe
    from pipeline.resolve import plan_recipe
    from pipeline.store import Store, default_store_path
    from pipeline.why import explain_stage

    store = Store(default_store_path())

    def why_one(loaded: Recipe) -> tuple[int, Any]:
        answer = explain_stage(plan_recipe(loaded, store=store), stage, store)
        if not json:
            typer.echo(f"{answer.stage}: {answer.status}" + (f" ({answer.reason})" if answer.reason else ""))
            if answer.compared_with:
                typer.echo(f"compared with the run of {answer.compared_with}:")
            for change in answer.changes:
                meaning = MEANINGS.get(change.what)
                typer.echo(f"  {change.what}: {change.before} -> {change.now}" + (f"  ({meaning})" if meaning else ""))
        return 0, answer.model_dump(mode="json")

    return for_each_cell(chosen_recipes(recipe, set_, cell), cell, why_one, json=json)
