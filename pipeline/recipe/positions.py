"""YAML as plain values, with the place of every key and value.

Only the safe core of YAML is read: no tag builds an object, a key stands once, and dates stay strings.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

import yaml

from pipeline.errors import Location, RecipeError

Path = tuple[str | int, ...]
PLAIN = {"map", "seq", "str", "int", "float", "bool", "null"}
"""Types of JSON, by their YAML tags."""

LARGEST = 100_000  # values; aliases of aliases could stand for billions

_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_Base):  # type: ignore[misc]
    """The safe loader without dates, and with 1e-3 as the number that it is everywhere else."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in _Base.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


class Positions:
    """Where each key of a nested value stands. A value made by an override stands in that override."""

    def __init__(self, file: str, known: dict[Path, Location] | None = None) -> None:
        self.file = file
        self._known = dict(known or {})

    def put(self, path: Path, location: Location) -> None:
        self._known[path] = location

    def find(self, path: Path) -> Location:
        """The place of `path`, or of the nearest thing around it."""
        while path not in self._known and path:
            path = path[:-1]
        return self._known.get(path, Location(self.file, 1, 1))

    def forget(self, path: Path) -> None:
        """Drop what is known of `path` and everything in it."""
        for known in [p for p in self._known if p[: len(path)] == path]:
            del self._known[known]

    def __contains__(self, path: object) -> bool:
        return path in self._known


def parse(text: str, file: str) -> tuple[Any, Positions]:
    """The value in a YAML text and the positions of everything in it.

    Raises: RecipeError where the text is not YAML, or not of the safe kind.
    """
    positions = Positions(file)
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            value = _Reader(loader, positions).read(node, ()) if node is not None else None
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = Location(file, mark.line + 1, mark.column + 1) if mark else None
        raise RecipeError(f"not YAML: {error.problem or error.context}", location=where) from None
    except yaml.YAMLError as error:
        raise RecipeError(f"not YAML: {' '.join(str(error).split())}", location=Location(file, 1, 1)) from None
    return value, positions


class _Reader:
    def __init__(self, loader: Any, positions: Positions) -> None:
        self._loader = loader
        self._positions = positions
        self._count = 0

    def read(self, node: yaml.Node, path: Path) -> Any:
        here = _location(node, self._positions.file)
        if path not in self._positions:
            self._positions.put(path, here)
        self._count += 1
        if self._count > LARGEST or len(path) > 50:
            raise RecipeError("the file holds too many values, or itself", location=here)
        if node.tag.removeprefix("tag:yaml.org,2002:") not in PLAIN:
            raise RecipeError(f"the tag {node.tag} would build an object; only plain YAML is read", location=here)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.read(item, (*path, i)) for i, item in enumerate(node.value)]
        try:
            return self._loader.construct_object(node)
        except (ValueError, KeyError) as error:
            raise RecipeError(f"{node.value!r} is not what its tag says: {error}", location=here) from None

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        own = {key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"}
        seen: set[str] = set()
        for key, value in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                if not isinstance(value, yaml.MappingNode):  # lists of merges of lists would grow without bound
                    where = _location(key, self._positions.file)
                    raise RecipeError("`<<` takes one mapping", location=where)
                continue
            if not isinstance(key, yaml.ScalarNode) or not isinstance(self._loader.construct_object(key), str):
                where = _location(key, self._positions.file)
                raise RecipeError("a key has to be text", location=where, hint="put it into quotes")
            if key.value in seen:
                where = _location(key, self._positions.file)
                raise RecipeError(f"the key {key.value!r} stands twice in one mapping", location=where)
            seen.add(key.value)
        self._loader.flatten_mapping(node)  # puts what `<<` brings before the mapping's own keys
        result: dict[str, Any] = {}
        for key, value in node.value:
            name = key.value
            if name in result and name not in own:
                continue
            here = (*path, name)
            self._positions.put(here, _location(key, self._positions.file))
            result[name] = self.read(value, here)
        return result


def _location(node: yaml.Node, file: str) -> Location:
    return Location(file, node.start_mark.line + 1, node.start_mark.column + 1)
