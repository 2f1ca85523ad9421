"""Parameters of passes, checked without a plan."""

from __future__ import annotations

from pipeline.errors import RecipeError
from pipeline.plugin import Registry
from pipeline.recipe.schema import Recipe
from pipeline.recipe.validation import validate


def check_parameters(recipe: Recipe, registry: Registry) -> None:
    """Check what every stage of `recipe` gives its pass.

    Raises: RecipeError where a pass is unknown or a parameter is wrong.
    """
    for stage in recipe.stages:
        where = ("passes", stage.index)
        try:
            found = registry.load(stage.pass_name)
        except RecipeError as error:
            location = recipe.location(*where, "pass")
            raise RecipeError(error.message, hint=error.hint, location=location) from None
        validate(found.Params, stage.params, recipe.positions, where)
