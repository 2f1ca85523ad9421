"""From files to a Recipe: read, compose, validate once, resolve."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from pipeline.errors import Location, RecipeError, did_you_mean
from pipeline.plugin import Registry
from pipeline.recipe.extends import with_base
from pipeline.recipe.gate_checks import checked_gates
from pipeline.recipe.groups import splice
from pipeline.recipe.library import Library, find_recipe, read_text, shipped_recipes
from pipeline.recipe.matrix import KEY as MATRIX
from pipeline.recipe.matrix import Overrides, cells_of
from pipeline.recipe.names import NAME, stage_name
from pipeline.recipe.overrides import apply_override, entry_name
from pipeline.recipe.parameters import check_parameters
from pipeline.recipe.parsing import parse
from pipeline.recipe.positions import Positions
from pipeline.recipe.schema import SOURCE, Recipe, RecipeFile, RecipeModel, Stage
from pipeline.recipe.tree import Node, plain
from pipeline.recipe.validation import validate
from pipeline.report.schema import Cell

__all__ = ["load_cells", "load_recipe", "recipe_from_text", "recipes_from_text", "shipped_recipes"]

Value = TypeVar("Value")


def load_recipe(path: str | Path, overrides: Sequence[str] = (), *, cell: int | None = None) -> Recipe:
    """Load the recipe at `path`, or the shipped recipe of that name, with `KEY=VALUE` overrides applied.

    `cell` chooses from the recipe's matrix, from 0; default: the first cell, if there are any.

    Raises: RecipeError with the place of every mistake.
    """
    return _chosen(load_cells(path, overrides), cell)


def load_cells(path: str | Path, overrides: Sequence[str] = ()) -> list[Recipe]:
    """Every cell of a recipe's matrix as a recipe, in order; the recipe alone where it has no matrix.

    Raises: RecipeError with the place of every mistake.
    """
    file = find_recipe(Path(path))
    return _recipes(read_text(file), label=str(path), folder=file.parent, file=file, overrides=overrides)


def recipe_from_text(
    text: str, *, file: str, folder: Path, overrides: Sequence[str] = (), cell: int | None = None
) -> Recipe:
    """The recipe in a YAML text. `file` is what messages call it; relative paths start from `folder`.

    Raises: RecipeError
    """
    return _chosen(recipes_from_text(text, file=file, folder=folder, overrides=overrides), cell)


def recipes_from_text(text: str, *, file: str, folder: Path, overrides: Sequence[str] = ()) -> list[Recipe]:
    """Every cell of the recipe in a YAML text, as `load_cells` gives them.

    Raises: RecipeError
    """
    return _recipes(text, label=file, folder=folder, file=None, overrides=overrides)


def _chosen(recipes: list[Recipe], cell: int | None) -> Recipe:
    if cell is None:
        return recipes[0]
    if recipes[0].cell is None:
        raise RecipeError(f"there is no cell {cell}: the recipe has no matrix")
    if not 0 <= cell < len(recipes):
        raise RecipeError(f"there is no cell {cell}: the recipe's matrix has the cells 0 to {len(recipes) - 1}")
    return recipes[cell]


def _recipes(text: str, *, label: str, folder: Path, file: Path | None, overrides: Sequence[str]) -> list[Recipe]:
    written = parse(text, label)
    if written is None:
        raise RecipeError("the file is empty; a recipe begins with `version: 1`", location=Location(label, 1, 1))
    if not isinstance(written.value, dict):
        raise RecipeError("a recipe is a mapping of keys to values", location=Location(label, 1, 1))
    library = Library(label, folder)
    whole = splice(with_base(written, library, file), library)
    cells = cells_of(whole)
    base = whole.without({MATRIX})
    registry = Registry(code="read")

    def composed(cell: Overrides | None) -> Node:
        tree = base if cell is None else splice(cell.apply(base), library)
        for override in overrides:
            tree = splice(apply_override(tree, override), library)
        return tree

    def resolved(tree: Node, cell: Cell | None = None, elsewhere: Mapping[str, int] | None = None) -> Recipe:
        recipe = _recipe(tree, elsewhere or {})
        recipe._folder, recipe._folders, recipe._text = folder.resolve(), library.folders, text
        recipe._cell = cell
        if cell is not None:  # a plan checks the parameters of its own cell; this tells of those in the others
            check_parameters(recipe, registry)
        return recipe

    if not cells:
        return [resolved(composed(None))]
    alone = _complaint(lambda: resolved(composed(None)))
    trees = [_in_cell(partial(composed, cell), index, cell, alone) for index, cell in enumerate(cells)]
    elsewhere = {name: index for index, tree in reversed(list(enumerate(trees))) for name in _names(tree)}
    recipes = []
    for index, (cell, tree) in enumerate(zip(cells, trees, strict=True)):
        facts = Cell(index=index, of=len(cells), overrides=cell.values())
        recipes.append(_in_cell(partial(resolved, tree, facts, elsewhere), index, cell, alone))
    return recipes


def _in_cell(make: Callable[[], Value], index: int, cell: Overrides, alone: str | None) -> Value:
    """What `make` makes; its mistakes name the cell, unless the recipe has them without any cell, too (`alone`)."""
    try:
        return make()
    except RecipeError as error:
        if str(error) == alone:
            raise
        found = f"in cell {index} of the matrix ({cell.at})"
        told = RecipeError(error.message, hint=f"{found}; {error.hint}" if error.hint else found)
        told.location = error.location
        raise told from None


def _complaint(make: Callable[[], object]) -> str | None:
    try:
        make()
    except RecipeError as error:
        return str(error)
    return None


def _names(tree: Node) -> list[str]:
    passes = tree.get("passes")
    return [entry_name(entry) for entry in passes.value] if passes and isinstance(passes.value, list) else []


def _recipe(tree: Node, elsewhere: Mapping[str, int]) -> Recipe:
    """The composed tree as a recipe; `elsewhere` says of stages in which cell of the matrix they are."""
    data, positions = plain(tree)
    checked = validate(RecipeFile, data, positions)
    stages = _stages(checked, positions)
    gates = checked_gates(checked, [s.name for s in stages], unmeasured(stages), positions, elsewhere)
    fields = {name: getattr(checked, name) for name in RecipeModel.model_fields}
    recipe = Recipe.model_construct(**fields, stages=stages, parsed_gates=gates)
    recipe._positions = positions
    return recipe


def unmeasured(stages: Sequence[Stage]) -> set[str]:
    """Names of the stages whose models are made and never run."""
    return {stage.name for stage in stages if not stage.measure}


def _stages(recipe: RecipeModel, positions: Positions) -> list[Stage]:
    stages: list[Stage] = []
    before = SOURCE
    for i, entry in enumerate(recipe.passes):
        name = entry.name or stage_name(entry.pass_)
        where = ("passes", i, "name" if entry.name else "pass")
        known = [SOURCE, *(s.name for s in stages)]
        if re.match(NAME, name) is None:
            raise RecipeError(
                f"{name!r} cannot name a stage",
                location=positions.find(where),
                hint="give the entry a `name:` of a-z, 0-9 and _",
            )
        if name == SOURCE:
            raise RecipeError("the name 'source' is reserved for the untouched model", location=positions.find(where))
        if name in known:
            first = next(s.index for s in stages if s.name == name)
            raise RecipeError(
                f"two stages are named {name!r}",
                location=positions.find(where),
                hint=f"the other is at {positions.find(('passes', first))}; give one of them a `name:`, "
                "which on a group is the prefix of its stages' names",
            )
        later = [e.name or stage_name(e.pass_) for e in recipe.passes[i:]]
        for role, stage in {"after": entry.after or before, **entry.inputs}.items():
            if stage not in known:
                key = ("passes", i, "after") if role == "after" else ("passes", i, "inputs", role)
                what = "comes later in the list" if stage in later else "is not there"
                what = "is the one that asks for it" if stage == name else what
                raise RecipeError(
                    f"{name}: the stage {stage!r} {what}",
                    location=positions.find(key),
                    hint=did_you_mean(stage, known, noun="stages before it"),
                )
        stages.append(
            Stage(
                name=name,
                pass_name=entry.pass_,
                params=dict(entry.model_extra or {}),
                parent=entry.after or before,
                inputs=entry.inputs,
                allow_broken=entry.allow_broken,
                measure=entry.measure,
                timeout_s=entry.timeout_s,
                index=i,
            )
        )
        before = name
    known = [SOURCE, *(s.name for s in stages)]
    for path, given in ((("evaluate", "baseline"), recipe.evaluate.baseline), (("export",), recipe.export)):
        if given is not None and given not in known:
            raise RecipeError(
                f"{'.'.join(path)}: there is no stage {given!r}",
                location=positions.find(path),
                hint=did_you_mean(given, known, noun="stages"),
            )
    if recipe.evaluate.baseline in unmeasured(stages):
        raise RecipeError(
            f"evaluate.baseline: {recipe.evaluate.baseline} is not to be measured, and the others are compared with it",
            location=positions.find(("evaluate", "baseline")),
            hint="take `measure: false` out of its entry, or name another baseline",
        )
    return stages
