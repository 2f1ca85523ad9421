"""Other values for a pass's parameters, found from their types: what the stage's key has to tell apart."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError

MOST_PAIRS = 400
"""Combinations with another parameter that are tried for one that nothing else goes with."""


class Variation(NamedTuple):
    """Two sets of parameters, as in a recipe, that differ in one."""

    before: dict[str, Any]
    after: dict[str, Any]


def variations(
    model: type[BaseModel], params: Mapping[str, Any], files: Path, known: Mapping[str, Any] | None = None
) -> dict[str, Variation | None]:
    """For each parameter a variation that is valid; None where none was found.

    Where validation wants another parameter changed, too, it is, on both sides. `files` is a folder for files that
    parameters name; `known` are values that are known to be valid.
    """
    schema = model.model_json_schema()
    definitions = schema.get("$defs", {})
    current = _dumped(model, params) or {}
    given = known or {}
    candidates = {
        name: [*([given[name]] if name in given else []), *_others(field, current.get(name), definitions, files)]
        for name, field in schema.get("properties", {}).items()
    }
    return {name: _variation(model, dict(params), name, candidates) for name in candidates}


def _variation(
    model: type[BaseModel], params: dict[str, Any], name: str, candidates: Mapping[str, list[Any]]
) -> Variation | None:
    for value in candidates[name]:
        if _differ(model, params, changed := {**params, name: value}):
            return Variation(params, changed)
    alone = {key: value for key, value in params.items() if key == name}  # the others may want the current one
    for value in candidates[name]:
        if _differ(model, alone, changed := {name: value}):
            return Variation(alone, changed)
    tried = 0
    for other, values in candidates.items():
        for beside in values if other != name else ():
            start = {**params, other: beside}
            for value in candidates[name]:
                tried += 1
                if tried > MOST_PAIRS:
                    return None
                if _differ(model, start, changed := {**start, name: value}):
                    return Variation(start, changed)
    return None


def _differ(model: type[BaseModel], before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Whether both are valid and mean something else."""
    one, two = _valid(model, before), _valid(model, after)
    return one is not None and two is not None and one != two


def _valid(model: type[BaseModel], params: Mapping[str, Any]) -> BaseModel | None:
    try:
        return model.model_validate_json(json.dumps(params))
    except (ValidationError, TypeError, ValueError):
        return None


def _dumped(model: type[BaseModel], params: Mapping[str, Any]) -> dict[str, Any] | None:
    found = _valid(model, params)
    return None if found is None else found.model_dump(mode="json")


def _others(field: Mapping[str, Any], current: Any, definitions: Mapping[str, Any], files: Path) -> Iterator[Any]:
    """Values that the JSON schema of a parameter may allow, other than the current one."""
    for value in _values(field, current, definitions, files):
        if value != current or type(value) is not type(current):
            yield value


def _values(field: Mapping[str, Any], current: Any, definitions: Mapping[str, Any], files: Path) -> Iterator[Any]:
    if "$ref" in field:
        yield from _values(definitions[field["$ref"].rpartition("/")[2]], current, definitions, files)
    elif "enum" in field:
        yield from field["enum"]
    elif "const" in field:
        yield field["const"]
    elif branches := field.get("anyOf") or field.get("oneOf") or field.get("allOf"):
        for branch in branches:
            yield from _values(branch, current, definitions, files)
    else:
        kind = field.get("type")
        if kind == "null":
            yield None
        elif kind == "boolean":
            yield from (True, False)
        elif kind in ("integer", "number"):
            yield from _numbers(field, current, whole=kind == "integer")
        elif kind == "string":
            yield from _strings(field, current, files)
        elif kind == "array":
            yield from _arrays(field, current, definitions, files)
        elif kind == "object":
            yield from _objects(field, current, definitions, files)


def _numbers(field: Mapping[str, Any], current: Any, *, whole: bool) -> Iterator[Any]:
    low = field.get("minimum", field.get("exclusiveMinimum"))
    high = field.get("maximum", field.get("exclusiveMaximum"))
    known = current if isinstance(current, int | float) and not isinstance(current, bool) else low or 1
    guesses = [known + 1, known - 1, known * 2, known / 2, low, high, 1, 2, 16]
    if low is not None and high is not None:
        guesses += [low + share * (high - low) for share in (0.25, 0.5, 0.75)]
    for guess in guesses:
        if guess is None:
            continue
        if not whole:
            yield float(guess)
        elif float(guess).is_integer():
            yield int(guess)


def _strings(field: Mapping[str, Any], current: Any, files: Path) -> Iterator[str]:
    form = field.get("format")
    if form in ("path", "file-path", "directory-path"):
        yield from _paths(files, current)
        return
    text = current if isinstance(current, str) else ""
    yield from (text + "x", "x", "", text[:-1])


def _paths(files: Path, current: Any) -> Iterator[str]:
    """A file and a folder that are not what the parameter names now."""
    was = Path(current).read_bytes() if isinstance(current, str) and Path(current).is_file() else b""
    folder = files / "of-parameters"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / (Path(current).name if isinstance(current, str) else "file")
    file.write_bytes(was + b"\n# changed\n")
    yield str(file)
    yield str(folder)


def _arrays(field: Mapping[str, Any], current: Any, definitions: Mapping[str, Any], files: Path) -> Iterator[list]:
    known = list(current) if isinstance(current, list) else []
    items = list(_values(field.get("items", {"type": "string"}), None, definitions, files))
    if known:
        yield known[:-1]
        yield [*known, known[0]]
    for item in items:
        yield [*known, item]
    yield []
    for item in items:
        yield [item]


def _objects(field: Mapping[str, Any], current: Any, definitions: Mapping[str, Any], files: Path) -> Iterator[dict]:
    known = dict(current) if isinstance(current, dict) else {}
    for name, inner in field.get("properties", {}).items():
        for value in _others(inner, known.get(name), definitions, files):
            yield {**known, name: value}
    if isinstance(inner := field.get("additionalProperties"), dict):
        for value in _values(inner, None, definitions, files):
            yield {**known, "x": value}
