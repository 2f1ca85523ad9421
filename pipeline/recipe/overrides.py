"""Overrides: one dotted key set to a value, from `--set` or from a cell of the matrix."""

from __future__ import annotations

from pipeline.errors import Location, RecipeError, did_you_mean
from pipeline.recipe.extends import MODEL_COMPANIONS
from pipeline.recipe.names import stage_name
from pipeline.recipe.parsing import parse
from pipeline.recipe.schema import MODEL_SOURCES
from pipeline.recipe.tree import Node, placed, plain


def apply_override(recipe: Node, override: str) -> Node:
    """`recipe` with `KEY=VALUE` set, such as `passes.int4.bits=8`. The value is YAML.

    Raises: RecipeError where the text is not KEY=VALUE or names a stage that is not there.
    """
    key, equals, text = override.partition("=")
    label = f"--set {override}"
    here = Location(label, 0, 0)
    if not equals or not key.strip():
        raise RecipeError("an override is KEY=VALUE, for example evaluate.budget_s=20", location=here)
    value = parse(text, label)
    return set_key(recipe, key.strip(), placed(None if value is None else plain(value)[0], here))


def set_key(recipe: Node, key: str, value: Node) -> Node:
    """`recipe` with the dotted `key` set to `value`. Stages go by their names; naming a model drops the one before.

    Raises: RecipeError where the key names a stage that is not there.
    """
    parts = key.split(".")
    if not all(parts):
        raise RecipeError(f"{key!r} is no dotted key such as evaluate.budget_s", location=value.at)
    if parts[0] == "model" and len(parts) > 1 and parts[1] in MODEL_SOURCES:
        model = recipe.get("model")
        if model is not None and isinstance(model.value, dict):
            stale = [name for name in MODEL_SOURCES if name != parts[1]]
            recipe = recipe.with_key("model", model.without([*stale, *(MODEL_COMPANIONS if len(parts) == 2 else ())]))
    return _set(recipe, parts, [], value)


def entry_name(entry: Node) -> str:
    """The stage that an entry of `passes` makes; empty where it does not say."""
    for key in ("name", "pass"):
        found = entry.get(key)
        if found is not None and isinstance(found.value, str) and found.value:
            return stage_name(found.value) if key == "pass" else found.value
    return ""


def _set(node: Node, parts: list[str], done: list[str], value: Node) -> Node:
    part, rest = parts[0], parts[1:]
    if isinstance(node.value, dict):
        inner = node.value.get(part)
        if rest:
            container = inner is not None and isinstance(inner.value, dict | list)
            value = _set(inner if inner and container else Node({}, value.at), rest, [*done, part], value)
        return node.with_key(part, value)
    index = _index(node, part, done, value.at)
    new = _set(node.value[index], rest, [*done, part], value) if rest else value
    return Node([*node.value[:index], new, *node.value[index + 1 :]], node.at)


def _index(node: Node, part: str, done: list[str], here: Location) -> int:
    """The place in a list that `part` means: a stage's name, or a number."""
    where = ".".join(done)
    if not isinstance(node.value, list):
        raise RecipeError(f"{where} has no keys", location=here)
    names = [entry_name(entry) for entry in node.value]
    if part in names:
        return names.index(part)
    if part.isdecimal() and int(part) < len(names):
        return int(part)
    hint = did_you_mean(part, filter(None, names)) if any(names) else f"it has {len(names)} entries, counted from 0"
    raise RecipeError(f"no entry {part!r} in {where}", location=here, hint=hint)
