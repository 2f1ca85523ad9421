"""`--cell`: which variants of a recipe a verb is for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from pipeline.recipe import Recipe
    from pipeline.report.schema import Cell

ALL = "all"
WORST_FIRST = (130, 2, 4, 3, 1)
"""Of several exit codes, the first of these decides."""


def chosen_recipes(path: str, overrides: Sequence[str] | None, cell: str | None) -> list[Recipe]:
    """The cell of the recipe's matrix that `cell` gives by number (default: the first), or every cell for `all`.

    Raises: RecipeError where there is no such cell.
    """
    from pipeline.errors import RecipeError
    from pipeline.recipe import load_cells, load_recipe

    if cell == ALL:
        return load_cells(path, overrides or ())
    if cell is not None and not cell.isdecimal():
        raise RecipeError(f"--cell takes a number, from 0, or `all`; got {cell!r}")
    return [load_recipe(path, overrides or (), cell=None if cell is None else int(cell))]


def for_each_cell(
    recipes: Sequence[Recipe], cell: str | None, act: Callable[[Recipe], tuple[int, Any]], *, json: bool
) -> int:
    """Do `act` for one recipe after the other. With `--cell all` each has a heading, and one that fails stops no other.

    `act` prints for people unless `json`, and returns its exit code and the value that JSON shows, of which several
    are printed as a list. Returns the exit code of the whole: the worst of those returned and of the errors raised.
    """
    from pipeline.cli.output import fail, print_json
    from pipeline.errors import PipelineError

    if cell != ALL:
        code, value = act(recipes[0])
        if json:
            print_json(value)
        return code
    codes, values = [], []
    if recipes[0].cell is None:
        typer.echo("the recipe has no matrix: there is one cell only, and no report over cells", err=True)
    for recipe in recipes:
        if recipe.cell is not None and not json:
            typer.secho(heading(recipe.cell), bold=True)
        try:
            code, value = act(recipe)
        except PipelineError as error:
            code = fail(error)
            value = {"cell": recipe.cell and recipe.cell.model_dump(mode="json"), "error": str(error)}
        codes.append(code)
        values.append(value)
    if json:
        print_json(values)
    return worst(codes)


def worst(codes: Iterable[int]) -> int:
    """The exit code that stands for several."""
    given = set(codes)
    return next((code for code in WORST_FIRST if code in given), max(given, default=0))


def heading(cell: Cell) -> str:
    """For example `cell 1 of 0 to 3: evaluate.threads=2`."""
    from pipeline.artifact import canonical_json

    changes = ", ".join(f"{key}={canonical_json(value).decode()}" for key, value in cell.overrides.items())
    return f"cell {cell.index} of 0 to {cell.of - 1}: {changes or 'nothing changed'}"
