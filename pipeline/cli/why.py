"""`pipeline why`"""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.cli.options import JsonOption, RecipeArgument, SetOption


def why_verb(
    recipe: RecipeArgument,
    stage: Annotated[str, typer.Argument(metavar="STAGE", help="A stage of the recipe.")],
    set_: SetOption = None,
    json: JsonOption = False,
) -> int:
    """Say why a stage is cached or has to run.

    Compares the stage's key with that of the most similar run that the store remembers.
    """
    from pipeline.cli.output import print_json
    from pipeline.recipe import load_recipe
    from pipeline.run import plan_recipe
    from pipeline.store import Store, default_store_path
    from pipeline.why import explain_stage

    store = Store(default_store_path())
    plan = plan_recipe(load_recipe(recipe, set_ or []), store=store)
    answer = explain_stage(plan, stage, store)
    if json:
        print_json(answer.model_dump(mode="json"))
        return 0
    typer.echo(f"{answer.stage}: {answer.status}" + (f" ({answer.reason})" if answer.reason else ""))
    if answer.compared_with:
        typer.echo(f"compared with the run of {answer.compared_with}:")
    for change in answer.changes:
        typer.echo(f"  {change.what}: {change.before} -> {change.now}")
    return 0
