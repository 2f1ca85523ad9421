"""YAML as a tree of plain values, with the place of every key and value.

Only the safe core of YAML is read: no tag builds an object, a key stands once, and dates stay strings.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

import yaml

from pipeline.errors import Location, RecipeError
from pipeline.recipe.tree import Node

PLAIN = {"map", "seq", "str", "int", "float", "bool", "null"}
"""Types of JSON, by their YAML tags."""

LARGEST = 100_000  # values; aliases of aliases could stand for billions
DEEPEST = 50  # mappings and lists in each other
MERGE = "tag:yaml.org,2002:merge"

_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_Base):  # type: ignore[misc]
    """The safe loader without dates, and with 1e-3 as the number that it is everywhere else."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in _Base.yaml_implicit_resolvers.items()
    }


class _Dumper(yaml.SafeDumper):
    """Quotes what the loader would not read back as the text that it is."""


_EXPONENT = re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$")
for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))


def parse(text: str, file: str) -> Node | None:
    """The tree of a YAML text; None where there is nothing in it but comments.

    Raises: RecipeError where the text is not YAML, or not of the safe kind.
    """
    try:
        _check_depth(text, file)
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            return _Reader(loader, file).read(node) if node is not None else None
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = Location(file, mark.line + 1, mark.column + 1) if mark else None
        told = error.problem or error.context
        if where is not None and _tab_indents(text, where.line):
            raise RecipeError(
                "a tab at the beginning of a line; YAML is indented with spaces", location=where
            ) from None
        raise RecipeError(f"not YAML: {told}", location=where) from None
    except yaml.YAMLError as error:
        raise RecipeError(f"not YAML: {' '.join(str(error).split())}", location=Location(file, 1, 1)) from None


def _tab_indents(text: str, line: int) -> bool:
    lines = text.splitlines()
    found = lines[line - 1] if line <= len(lines) else ""
    return "\t" in found[: len(found) - len(found.lstrip())]


def _check_depth(text: str, file: str) -> None:
    """Refuse what is nested too deep before it is composed, which recurses in C and would end the process."""
    depth = 0
    mark: Any = None
    try:
        for event in yaml.parse(text, Loader=_Loader):
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
            if depth > DEEPEST:
                mark = event.start_mark
                break
    except yaml.MarkedYAMLError as error:
        # a libyaml that has a limit of its own reads so far ahead that it may come first
        if "maximum nesting depth" not in (error.problem or ""):
            raise
        mark = error.problem_mark
    if mark is not None:
        where = Location(file, mark.line + 1, mark.column + 1)
        raise RecipeError(f"mappings and lists are nested more than {DEEPEST} deep", location=where)


def to_yaml(value: Any) -> str:
    """Plain values as YAML text, such that `parse` reads the same values."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Reader:
    def __init__(self, loader: Any, file: str) -> None:
        self._loader = loader
        self._file = file
        self._count = 0

    def read(self, node: yaml.Node, at: Location | None = None, depth: int = 0) -> Node:
        """The tree below `node`, which stands at `at` (default: where its text begins)."""
        here = self._location(node)
        self._count += 1
        if self._count > LARGEST or depth > DEEPEST:
            raise RecipeError("the file holds too many values, or itself", location=here)
        if node.tag.removeprefix("tag:yaml.org,2002:") not in PLAIN:
            raise RecipeError(f"the tag {node.tag} would build an object; only plain YAML is read", location=here)
        if isinstance(node, yaml.MappingNode):
            return Node(self._mapping(node, depth), at or here)
        if isinstance(node, yaml.SequenceNode):
            return Node([self.read(item, depth=depth + 1) for item in node.value], at or here)
        try:
            return Node(self._loader.construct_object(node), at or here)
        except (ValueError, KeyError) as error:
            raise RecipeError(f"{node.value!r} is not what its tag says: {error}", location=here) from None

    def _mapping(self, node: yaml.MappingNode, depth: int) -> dict[str, Node]:
        own = {key.value for key, _ in node.value if key.tag != MERGE}
        seen: set[str] = set()
        for key, value in node.value:
            if key.tag == MERGE:
                if not isinstance(value, yaml.MappingNode):  # lists of merges of lists would grow without bound
                    raise RecipeError("`<<` takes one mapping", location=self._location(key))
                continue
            if not isinstance(key, yaml.ScalarNode) or not isinstance(self._loader.construct_object(key), str):
                raise RecipeError("a key has to be text", location=self._location(key), hint="put it into quotes")
            if key.value in seen:
                where = self._location(key)
                raise RecipeError(f"the key {key.value!r} stands twice in one mapping", location=where)
            seen.add(key.value)
        self._loader.flatten_mapping(node)  # puts what `<<` brings before the mapping's own keys
        result: dict[str, Node] = {}
        for key, value in node.value:
            if key.value not in result or key.value in own:
                result[key.value] = self.read(value, self._location(key), depth + 1)
        return result

    def _location(self, node: yaml.Node) -> Location:
        return Location(self._file, node.start_mark.line + 1, node.start_mark.column + 1)
