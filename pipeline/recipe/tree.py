"""A recipe's values as a tree in which each value knows its place, whatever file it came from.

Trees are never changed: composing recipes makes new ones that share what stays the same.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.errors import Location
from pipeline.recipe.positions import Path, Positions


@dataclass(frozen=True)
class Node:
    """A value: a mapping or list of nodes, or a scalar. `at` is where its key, list item or text stands."""

    value: Any
    at: Location

    def get(self, key: str) -> Node | None:
        """What a mapping has under `key`; None where this is no mapping or has no such key."""
        return self.value.get(key) if isinstance(self.value, dict) else None

    def with_key(self, key: str, node: Node) -> Node:
        """A mapping like this one, with `key` set."""
        return Node({**self.value, key: node}, self.at)

    def without(self, keys: Collection[str]) -> Node:
        """A mapping like this one without `keys`."""
        return Node({k: v for k, v in self.value.items() if k not in keys}, self.at)


def plain(node: Node) -> tuple[Any, Positions]:
    """The tree as plain values, and the position of everything in it."""
    positions = Positions(node.at.file)

    def read(current: Node, path: Path) -> Any:
        positions.put(path, current.at)
        if isinstance(current.value, dict):
            return {key: read(inner, (*path, key)) for key, inner in current.value.items()}
        if isinstance(current.value, list):
            return [read(inner, (*path, i)) for i, inner in enumerate(current.value)]
        return current.value

    return read(node, ()), positions


def placed(value: Any, at: Location) -> Node:
    """Plain values as a tree that stands in one place."""
    if isinstance(value, Mapping):
        return Node({str(key): placed(inner, at) for key, inner in value.items()}, at)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return Node([placed(inner, at) for inner in value], at)
    return Node(value, at)
