"""The JSON Schemas of recipes and of groups, for editors: every installed pass with its own parameters."""

from __future__ import annotations

from typing import Any

from pipeline.errors import PipelineError
from pipeline.file_pass import FILE_PASS
from pipeline.plugin import Registry
from pipeline.recipe.matrix import FIXED
from pipeline.recipe.schema import COMPARISONS, MODEL_SOURCES, Entry, GroupEntry, GroupFile, RecipeFile
from pipeline.report.gates import METRICS

DIALECT = "https://json-schema.org/draft/2020-12/schema"
NEEDED = ("version", "name", "model")
"""Keys of a recipe that extends no other."""


def recipe_json_schema(registry: Registry) -> dict[str, Any]:
    """JSON Schema (2020-12) of a recipe's file. Passes that cannot be imported are left out."""
    schema = RecipeFile.model_json_schema(by_alias=True)
    properties = schema["properties"]
    _put_passes(schema, registry)
    properties["gates"]["items"]["pattern"] = _gate_pattern()
    for variant in properties["matrix"]["anyOf"]:
        if variant.get("type") == "array":
            variant["items"]["propertyNames"] = _cell_keys()
    schema["$defs"]["Cross"]["properties"]["cross"]["propertyNames"] = _cell_keys()
    del schema["required"]
    one_source = {"oneOf": [{"required": [name]} for name in MODEL_SOURCES]}
    schema["if"] = {"not": {"required": ["extends"]}}
    schema["then"] = {"required": list(NEEDED), "properties": {"model": one_source}}
    return {"$schema": DIALECT, **schema}


def group_json_schema(registry: Registry) -> dict[str, Any]:
    """JSON Schema (2020-12) of a group's file."""
    schema = GroupFile.model_json_schema(by_alias=True)
    _put_passes(schema, registry)
    return {"$schema": DIALECT, **schema}


def _put_passes(schema: dict[str, Any], registry: Registry) -> None:
    """Have the list `passes` take a group, or an entry of a pass with the parameters that this pass has."""
    definitions = schema.setdefault("$defs", {})
    definitions["GroupEntry"] = GroupEntry.model_json_schema(by_alias=True)
    common = Entry.model_json_schema(by_alias=True)["properties"]
    variants = [{"$ref": "#/$defs/GroupEntry"}]
    for name in registry.names():
        try:
            found = registry.load(name)
        except PipelineError:  # `pipeline passes` says why
            continue
        params = found.Params.model_json_schema(ref_template=f"#/$defs/pass.{name}.{{model}}")
        for key, definition in params.pop("$defs", {}).items():
            definitions[f"pass.{name}.{key}"] = definition
        definitions[f"pass.{name}"] = {
            "type": "object",
            "title": name,
            "description": found.summary(),
            "properties": {**common, "pass": {"const": name}, **params.get("properties", {})},
            "required": ["pass", *params.get("required", ())],
            "additionalProperties": params.get("additionalProperties", False),
        }
        variants.append({"$ref": f"#/$defs/pass.{name}"})
    definitions["file_pass"] = {
        "type": "object",
        "description": "a pass in a Python file beside the recipe, ./FILE.py:CLASS, which runs with --allow-code",
        "properties": {**common, "pass": {"type": "string", "pattern": FILE_PASS}},
        "required": ["pass"],
    }
    variants.append({"$ref": "#/$defs/file_pass"})
    definitions.pop("Entry", None)
    schema["properties"]["passes"]["items"] = {"oneOf": variants}


def _gate_pattern() -> str:
    metrics, operators = "|".join(sorted(METRICS)), "|".join(COMPARISONS)
    return rf"^\s*[a-z][a-z0-9_]*\.({metrics})\s*(\{{[^}}]*\}})?\s*({operators})\s*[-+0-9.eE]+\s*$"


def _cell_keys() -> dict[str, Any]:
    return {"not": {"pattern": rf"^({'|'.join(FIXED)})(\.|$)"}}
