"""pydantic's complaints as sentences with a place and the nearest known name."""

from __future__ import annotations

import json
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from pipeline.errors import RecipeError, did_you_mean
from pipeline.recipe.names import NAME, RUN_NAME
from pipeline.recipe.positions import Path, Positions

Value = TypeVar("Value", bound=BaseModel)

WORDS = {
    "model_type": "should be a mapping, `key: value`",
    "dict_type": "should be a mapping, `key: value`",
    "list_type": "should be a list: `[…]`, or lines that begin with `- `",
    "tuple_type": "should be a list: `[…]`, or lines that begin with `- `",
    "too_long": "should have at most {max_length} items, not {actual_length}",
    "too_short": "should have at least {min_length} item(s), not {actual_length}",
}
"""pydantic's kinds of mistakes, in the words of a recipe."""

PATTERN_WORDS = {
    NAME: "should begin with a lower-case letter and go on with lower-case letters, digits and _",
    RUN_NAME: "should begin with a letter or digit and go on with letters, digits, `.`, `_` and `-`",
}


def validate(model: type[Value], data: Any, positions: Positions, base: Path = ()) -> Value:
    """`data` as a `model`, strictly typed.

    `base` is the path of `data` in the file that `positions` describes.

    Raises: RecipeError that names every mistake with its file, line and column.
    """
    try:
        # As JSON, so that strict typing takes a list for a tuple and a string for a path, and nothing else
        return model.model_validate_json(json.dumps(data))
    except ValidationError as error:
        raise explain(error, model, positions, base) from None


def explain(error: ValidationError, model: type[BaseModel], positions: Positions, base: Path = ()) -> RecipeError:
    """All mistakes in one error, in the order of the file."""
    by_place: dict[Path, list[dict[str, Any]]] = {}
    for detail in error.errors(include_url=False):
        location: Path = tuple(part for part in detail["loc"] if not _is_branch(part))
        by_place.setdefault(location, []).append(dict(detail))
    found = []
    for location, details in by_place.items():
        # Of a value that may be one thing or another, what is wrong with it as the thing that it is
        telling = [d for d in details if not d["type"].endswith("_type")] or details
        where = positions.find((*base, *location))
        found += [(where, _sentence(detail, location, model)) for detail in telling]
    found.sort(key=lambda pair: (pair[0].line, pair[0].column))
    first = found[0][0]
    text = "\n".join(f"{where}: {sentence}" if i else sentence for i, (where, sentence) in enumerate(found))
    return RecipeError(text, location=first)


def known_keys(model: type[BaseModel], location: Path) -> list[str]:
    """The keys that the mapping at `location` may have."""
    current: Any = model
    for part in location:
        current = _model_in(current)
        if current is None:
            return []
        if isinstance(part, int):
            continue
        field = next((f for n, f in current.model_fields.items() if part in {n, f.alias}), None)
        if field is None:
            return []
        current = field.annotation
    current = _model_in(current)
    return [f.alias or n for n, f in current.model_fields.items()] if current is not None else []


def _sentence(detail: dict[str, Any], location: Path, model: type[BaseModel]) -> str:
    name = ".".join(str(p) for p in location)
    kind, message = detail["type"], detail["msg"]
    if kind == "extra_forbidden":
        return f"unknown key {location[-1]!r}; {did_you_mean(str(location[-1]), known_keys(model, location[:-1]))}"
    if kind == "missing":
        return f"the key {location[-1]!r} is missing"
    if kind == "value_error":
        message = message.removeprefix("Value error, ")
        return f"{name}: {message}" if name else message
    if kind in WORDS:
        message = WORDS[kind].format(**detail.get("ctx", {}))
    message = PATTERN_WORDS.get(str(detail.get("ctx", {}).get("pattern")), message)
    message = message.replace("Input should be", "should be").replace("String should", "should")
    got = detail.get("input")
    shown = "nothing" if got is None else json.dumps(got, ensure_ascii=False)
    shown = shown if len(shown) <= 60 else shown[:57] + "…"
    return f"{name} {message[0].lower()}{message[1:]}; got {shown}" if name else f"{message}; got {shown}"


def _is_branch(part: str | int) -> bool:
    """True for the parts of a location that name a branch of a union rather than a key."""
    return isinstance(part, str) and ("[" in part or part in {"str", "int", "float", "bool", "constrained-int"})


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model that a field's annotation holds: itself, in a list, or beside None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in {list, tuple, Union, UnionType}:
        return next((m for arg in get_args(annotation) if (m := _model_in(arg)) is not None), None)
    return None
