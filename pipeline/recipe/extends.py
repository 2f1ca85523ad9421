"""`extends`: a recipe that says only what it changes in another one."""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import RecipeError
from pipeline.recipe.library import Library, shipped_recipes
from pipeline.recipe.schema import MODEL_SOURCES
from pipeline.recipe.tree import Node

KEY = "extends"
MODEL_COMPANIONS = ("revision", "trust_remote_code")
"""What is said of one model and means nothing, or something dangerous, for another."""


def with_base(recipe: Node, library: Library, file: Path | None) -> Node:
    """`recipe` merged over what it extends, however many levels; `file` is where it was read from, if from a file.

    Raises: RecipeError where a base is not there, or bases go round in a circle.
    """
    chain = [] if file is None else [file.resolve()]
    layers = [recipe]
    _check_version(recipe)
    while (named := layers[-1].get(KEY)) is not None and named.value is not None:
        if not isinstance(named.value, str) or not named.value:
            raise RecipeError("extends takes the path of a recipe, or a shipped one's name", location=named.at)
        base, found = library.read(named, shipped_recipes(), "recipe")
        if found in chain:
            circle = " -> ".join(path.name for path in [*chain[chain.index(found) :], found])
            raise RecipeError(f"recipes extend each other in a circle: {circle}", location=named.at)
        _check_version(base)
        chain.append(found)
        layers.append(base)
    result = layers.pop()
    while layers:
        result = merge(result, layers.pop())
    return result.without({KEY})


def merge(base: Node, over: Node) -> Node:
    """`over` laid over `base`: mappings merge, the rest replaces. A model has one source: that of `over`, if given."""
    merged = _merge(base, over)
    below, above = base.get("model"), over.get("model")
    if below is not None and above is not None and isinstance(below.value, dict) and isinstance(above.value, dict):
        named = set(MODEL_SOURCES) & set(above.value)
        if named:
            stale = ({*MODEL_SOURCES} - named) | {key for key in MODEL_COMPANIONS if key not in above.value}
            merged = merged.with_key("model", merged.value["model"].without(stale))
    return merged


def _check_version(recipe: Node) -> None:
    version = recipe.get("version")
    if version is not None and version.value != 1:
        raise RecipeError(
            f"this is a recipe of version {version.value!r}; this program reads version 1", location=version.at
        )


def _merge(base: Node, over: Node) -> Node:
    if not (isinstance(base.value, dict) and isinstance(over.value, dict)):
        return over
    mine = {key: _merge(base.value[key], new) if key in base.value else new for key, new in over.value.items()}
    return Node({**base.value, **mine}, over.at)
