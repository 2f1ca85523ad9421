"""Groups: lists of passes in files of their own, spliced into the recipes that name them."""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import RecipeError
from pipeline.recipe.library import Library, shipped_groups
from pipeline.recipe.overrides import entry_name
from pipeline.recipe.schema import GroupEntry, GroupFile
from pipeline.recipe.tree import Node, plain
from pipeline.recipe.validation import validate

MOST_STAGES = 1000
"""Groups in groups could stand for billions."""


def splice(recipe: Node, library: Library) -> Node:
    """`recipe` with each `{group: FILE}` among its passes replaced by the entries of that file.

    Raises: RecipeError where a group is not there, holds no passes, or holds itself.
    """
    passes = recipe.get("passes")
    if passes is None or not isinstance(passes.value, list) or not any(map(_is_group, passes.value)):
        return recipe
    return recipe.with_key("passes", Node(_expand(passes.value, library, ()), passes.at))


def _is_group(entry: Node) -> bool:
    return entry.get("group") is not None


def _expand(entries: list[Node], library: Library, chain: tuple[Path, ...]) -> list[Node]:
    found: list[Node] = []
    for entry in entries:
        found += _entries_of(entry, library, chain) if _is_group(entry) else [entry]
        if len(found) > MOST_STAGES:
            raise RecipeError(f"the groups hold more than {MOST_STAGES} passes", location=entry.at)
    return found


def _entries_of(entry: Node, library: Library, chain: tuple[Path, ...]) -> list[Node]:
    if (both := entry.get("pass")) is not None:
        raise RecipeError("an entry has either `pass` or `group`", location=both.at)
    asked = validate(GroupEntry, *plain(entry))
    named = entry.value["group"]
    tree, file = library.read(named, shipped_groups(), "group")
    if file in chain:
        circle = " -> ".join(path.name for path in [*chain[chain.index(file) :], file])
        raise RecipeError(f"groups hold each other in a circle: {circle}", location=named.at)
    validate(GroupFile, *plain(tree))
    entries = _expand(tree.value["passes"].value, library, (*chain, file))
    if asked.name is not None:
        own = {entry_name(e) for e in entries}
        entries = [_prefixed(e, f"{asked.name}_", own) for e in entries]
    if "after" in entry.value:
        entries[0] = entries[0].with_key("after", entry.value["after"])
    return entries


def _prefixed(entry: Node, prefix: str, own: set[str]) -> Node:
    """The entry under its longer name, with what it says of the group's `own` stages changed accordingly."""

    def renamed(node: Node) -> Node:
        return Node(prefix + node.value, node.at) if isinstance(node.value, str) and node.value in own else node

    given = entry.get("name") or entry.get("pass")
    if given is None or not isinstance(given.value, str):
        return entry  # what is wrong with it is said when the whole recipe is checked
    entry = entry.with_key("name", Node(prefix + entry_name(entry), given.at))
    if (after := entry.get("after")) is not None:
        entry = entry.with_key("after", renamed(after))
    inputs = entry.get("inputs")
    if inputs is not None and isinstance(inputs.value, dict):
        roles = {role: renamed(node) for role, node in inputs.value.items()}
        entry = entry.with_key("inputs", Node(roles, inputs.at))
    return entry
