"""What is known of the installed passes, for people and for schemas. A pass that fails to import is listed, too."""

from __future__ import annotations

import json
from collections.abc import Iterator
from inspect import cleandoc
from typing import Any

from pydantic import BaseModel, Field, TypeAdapter

from pipeline.artifact import Frozen
from pipeline.errors import PipelineError
from pipeline.file_pass import CodeFile
from pipeline.plugin import Pass, Registry, Requires, UnreadPass


class Parameter(Frozen):
    """A parameter of a pass, in words."""

    name: str
    type: str
    default: str
    description: str

    @classmethod
    def of_schema(cls, name: str, schema: dict[str, Any], *, default: str, description: str) -> Parameter:
        """One whose values a JSON Schema without references describes."""
        return cls(name=name, type=_type_in_words(schema, {}), default=default, description=description)


class PassDescription(Frozen):
    name: str
    origin: str
    problem: str | None = None
    summary: str = ""
    documentation: str = ""
    version: int | None = None
    accepts: tuple[str, ...] = ()
    produces: str | None = None
    libraries: tuple[str, ...] = ()
    depends_on: tuple[str, ...] = ()
    requires: Requires = Requires()
    roles: tuple[str, ...] = ()
    comes_before: dict[str, str] = Field(default_factory=dict)
    comes_after: dict[str, str] = Field(default_factory=dict)
    deterministic: bool = True
    parameters: tuple[Parameter, ...] = ()
    is_known_by_text: bool = Field(False, description="it is in a file whose code was not run: only its text was read")


def describe_pass(registry: Registry, name: str, code: CodeFile | None = None) -> PassDescription:
    """Everything about one pass, which may be in a file; where it cannot be used, why.

    Raises: RecipeError where no pass has that name.
    """
    origin = registry.origin(name) if code is None else code.path
    try:
        found = registry.load(name, code)
        parameters = tuple(describe_fields(found.Params))
    except PipelineError as error:
        if code is not None:  # nothing lists it
            raise
        return PassDescription(name=name, origin=origin, problem=error.message)
    except Exception as error:  # a stranger's parameters may have no schema, or raise anything
        reason = str(error).partition("\n")[0]
        return PassDescription(name=name, origin=origin, problem=f"its parameters cannot be put into JSON: {reason}")
    unread = issubclass(found, UnreadPass)
    said: dict[str, Any] = found.said if issubclass(found, UnreadPass) else dict(_declared(found))
    return PassDescription(
        name=name,
        origin=origin,
        is_known_by_text=unread,
        summary=found.summary(),
        documentation=cleandoc(found.__doc__ or ""),
        version=said.get("version"),
        accepts=tuple(sorted(said.get("accepts", ()))),
        produces=said.get("produces"),
        libraries=tuple(found.libraries),
        depends_on=tuple(found.depends_on),
        requires=found.requires,
        roles=tuple(found.roles),
        comes_before=dict(found.comes_before),
        comes_after=dict(found.comes_after),
        deterministic=found.deterministic,
        parameters=parameters,
    )


def _declared(found: type[Pass]) -> Iterator[tuple[str, Any]]:
    for name in ("version", "accepts", "produces"):
        if hasattr(found, name):
            yield name, getattr(found, name)


def describe_fields(model: type[BaseModel]) -> list[Parameter]:
    """The fields of a model, such as a pass's `Params`, in words."""
    schema = model.model_json_schema()
    required = set(schema.get("required", ()))
    return [
        Parameter(
            name=name,
            type=_type_in_words(field, schema.get("$defs", {})),
            default="required" if name in required else _default(model, name),
            description=field.get("description", ""),
        )
        for name, field in schema.get("properties", {}).items()
    ]


def _default(model: type[BaseModel], name: str) -> str:
    field = next(f for n, f in model.model_fields.items() if name in {n, f.alias})
    value = field.get_default(call_default_factory=True, validated_data={})
    return json.dumps(TypeAdapter(Any).dump_python(value, mode="json"), ensure_ascii=False)


def _type_in_words(field: dict[str, Any], definitions: dict[str, Any]) -> str:
    if "$ref" in field:
        return _type_in_words(definitions[field["$ref"].rpartition("/")[2]], definitions)
    if "enum" in field:
        return " | ".join(json.dumps(v) for v in field["enum"])
    if "const" in field:
        return json.dumps(field["const"])
    if "anyOf" in field:
        return " | ".join(_type_in_words(f, definitions) for f in field["anyOf"])
    name = str(field.get("type", "any"))
    if name == "array":
        least = ", not empty" if field.get("minItems") == 1 else ""
        return f"list of {_type_in_words(field.get('items', {}), definitions)}{least}"
    if name == "object" and isinstance(field.get("additionalProperties"), dict):
        return f"mapping of name to {_type_in_words(field['additionalProperties'], definitions)}"
    if name == "object":
        return "mapping"
    bounds = [f"{sign} {field[key]}" for key, sign in _BOUNDS.items() if key in field]
    return f"{name} {' and '.join(bounds)}" if bounds else name


_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
