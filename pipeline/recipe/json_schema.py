"""The JSON Schema of a recipe, for editors: every installed pass with its own parameters."""

from __future__ import annotations

from typing import Any

from pipeline.errors import PipelineError
from pipeline.plugin import Registry
from pipeline.recipe.schema import Entry, RecipeModel


def recipe_json_schema(registry: Registry) -> dict[str, Any]:
    """JSON Schema (2020-12). Passes that cannot be imported are left out."""
    schema = RecipeModel.model_json_schema(by_alias=True)
    definitions = schema.setdefault("$defs", {})
    common = Entry.model_json_schema(by_alias=True)["properties"]
    variants = []
    for name in registry.names():
        try:
            found = registry.load(name)
        except PipelineError:  # `pipeline passes` says why
            continue
        params = found.Params.model_json_schema(ref_template=f"#/$defs/pass.{name}.{{model}}")
        for key, definition in params.pop("$defs", {}).items():
            definitions[f"pass.{name}.{key}"] = definition
        variant = {
            "type": "object",
            "title": name,
            "description": found.summary(),
            "properties": {**common, "pass": {"const": name}, **params.get("properties", {})},
            "required": ["pass", *params.get("required", ())],
            "additionalProperties": False,
        }
        definitions[f"pass.{name}"] = variant
        variants.append({"$ref": f"#/$defs/pass.{name}"})
    schema["properties"]["passes"]["items"] = {"oneOf": variants} if variants else {"$ref": "#/$defs/Entry"}
    if variants:
        definitions.pop("Entry", None)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
