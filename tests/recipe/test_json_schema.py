"""The JSON Schema of recipes agrees with the loader."""

from __future__ import annotations

import jsonschema
import pytest
import yaml

from pipeline.plugin import Registry
from pipeline.recipe.json_schema import recipe_json_schema
from pipeline.recipe.load import shipped_recipes


@pytest.fixture(scope="module")
def schema() -> dict:
    found = recipe_json_schema(Registry())
    jsonschema.Draft202012Validator.check_schema(found)
    return found


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_every_shipped_recipe_fits_the_schema(name: str, schema: dict) -> None:
    jsonschema.validate(yaml.safe_load(shipped_recipes()[name].read_text()), schema)


def test_a_misspelt_parameter_does_not_fit_the_schema(schema: dict) -> None:
    recipe = {
        "version": 1,
        "name": "x",
        "model": {"builtin": "llama2-tiny"},
        "passes": [{"pass": "quantize_weights", "bit": 4}],
    }
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(recipe, schema)
