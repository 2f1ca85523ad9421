"""The passes of a recipe's stages, and parameters of passes checked without a plan."""

from __future__ import annotations

from pipeline.errors import PipelineError, RecipeError
from pipeline.file_pass import CodeFile, find_code, names_file
from pipeline.plugin import Pass, Registry
from pipeline.recipe.schema import Recipe, Stage
from pipeline.recipe.validation import validate


def pass_of(stage: Stage, recipe: Recipe, registry: Registry) -> tuple[type[Pass], CodeFile | None]:
    """(the stage's pass, the file that it is in: one below the folder of the recipe or group that names it).

    Raises: RecipeError, with its place, where a pass is unknown, its file is not there, or may not run.
    """
    where = ("passes", stage.index, "pass")
    try:
        code = find_code(stage.pass_name, recipe.folder_of(*where))
        return registry.load(stage.pass_name, code), code
    except RecipeError as error:
        if error.location is not None:  # in the code, then
            raise
        raise RecipeError(error.message, hint=error.hint, location=recipe.location(*where)) from None
    except PipelineError as error:
        if not names_file(stage.pass_name):
            raise
        raise RecipeError(error.message, hint=error.hint, location=recipe.location(*where)) from error


def check_parameters(recipe: Recipe, registry: Registry) -> None:
    """Check what every stage of `recipe` gives its pass.

    Raises: RecipeError where a pass is unknown or a parameter is wrong.
    """
    for stage in recipe.stages:
        found, _ = pass_of(stage, recipe, registry)
        validate(found.Params, stage.params, recipe.positions, ("passes", stage.index))
