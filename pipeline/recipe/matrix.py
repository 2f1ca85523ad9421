"""`matrix`: one recipe in several variants, its cells, each a mapping of overrides."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

from pipeline.errors import Location, RecipeError
from pipeline.recipe.overrides import set_key
from pipeline.recipe.tree import Node, plain

KEY = "matrix"
MOST_CELLS = 1000
FIXED = ("version", "extends", "matrix")
"""Keys that are settled before a cell applies."""


@dataclass(frozen=True)
class Overrides:
    """What one cell changes: dotted key -> value."""

    keys: dict[str, Node]
    at: Location

    def apply(self, recipe: Node) -> Node:
        for key, value in self.keys.items():
            recipe = set_key(recipe, key, value)
        return recipe

    def values(self) -> dict[str, Any]:
        return {key: plain(value)[0] for key, value in self.keys.items()}


def cells_of(recipe: Node) -> list[Overrides]:
    """The cells of the recipe's matrix, in order; none where it has no matrix.

    Raises: RecipeError where the matrix is empty, or neither a list of mappings nor a cross.
    """
    matrix = recipe.get(KEY)
    if matrix is None:
        return []
    if isinstance(matrix.value, dict):
        cells = _cross(matrix)
    elif isinstance(matrix.value, list):
        cells = [Overrides(_mapping(cell), cell.at) for cell in matrix.value]
    else:
        raise RecipeError(
            f"a matrix is a list of mappings or {{cross: …}}; got {matrix.value!r}",
            location=matrix.at,
            hint="for example `matrix: [{evaluate.budget_s: 20}, {evaluate.budget_s: 60}]`",
        )
    if not cells:
        raise RecipeError("the matrix is empty", location=matrix.at, hint="give it a cell, or leave it out")
    if len(cells) > MOST_CELLS:
        raise RecipeError(f"the matrix has {len(cells)} cells; {MOST_CELLS} are allowed", location=matrix.at)
    return cells


def _mapping(cell: Node) -> dict[str, Node]:
    if not isinstance(cell.value, dict):
        raise RecipeError(
            f"a cell of the matrix is a mapping of dotted keys to values; got {plain(cell)[0]!r}", location=cell.at
        )
    for key, value in cell.value.items():
        _check_key(key, value.at)
    return dict(cell.value)


def _cross(matrix: Node) -> list[Overrides]:
    cross = matrix.get("cross")
    if cross is None or len(matrix.value) > 1 or not isinstance(cross.value, dict):
        raise RecipeError(
            "a matrix that is a mapping has the one key `cross`, a mapping of dotted keys to lists of values",
            location=matrix.at,
            hint="for example `matrix: {cross: {evaluate.threads: [1, 2], passes.int4.bits: [4, 8]}}`",
        )
    for key, values in cross.value.items():
        _check_key(key, values.at)
        if not isinstance(values.value, list) or not values.value:
            raise RecipeError(f"{key}: a list of values, at least one; got {plain(values)[0]!r}", location=values.at)
    if not cross.value:
        return []
    lists = [values.value for values in cross.value.values()]
    if (count := math.prod(map(len, lists))) > MOST_CELLS:
        raise RecipeError(f"the matrix has {count} cells; {MOST_CELLS} are allowed", location=cross.at)
    return [Overrides(dict(zip(cross.value, chosen, strict=True)), cross.at) for chosen in itertools.product(*lists)]


def _check_key(key: str, at: Location) -> None:
    if key.split(".", maxsplit=1)[0] in FIXED:
        raise RecipeError(f"a cell cannot set {key!r}", location=at)
