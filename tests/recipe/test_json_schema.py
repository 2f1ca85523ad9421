"""The JSON Schemas of recipes and groups agree with the loader."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest
import yaml

from pipeline.errors import RecipeError
from pipeline.plugin import Registry
from pipeline.recipe.json_schema import group_json_schema, recipe_json_schema
from pipeline.recipe.library import shipped_groups, shipped_recipes
from pipeline.recipe.load import recipes_from_text
from pipeline.recipe.parameters import check_parameters

HEAD = "version: 1\nname: x\nmodel: {builtin: llama2-tiny}\n"


@pytest.fixture(scope="module")
def fits() -> Callable[[str], bool]:
    found = recipe_json_schema(Registry())
    jsonschema.Draft202012Validator.check_schema(found)
    validator = jsonschema.Draft202012Validator(found)
    return lambda text: validator.is_valid(yaml.safe_load(text))


@pytest.fixture(scope="module")
def group_schema() -> dict:
    found = group_json_schema(Registry())
    jsonschema.Draft202012Validator.check_schema(found)
    return found


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_every_shipped_recipe_fits_the_schema(name: str, fits: Callable[[str], bool]) -> None:
    assert fits(shipped_recipes()[name].read_text())


@pytest.mark.parametrize("name", sorted(shipped_groups()))
def test_every_shipped_group_fits_the_schema(name: str, group_schema: dict) -> None:
    jsonschema.validate(yaml.safe_load(shipped_groups()[name].read_text()), group_schema)


@pytest.mark.parametrize(
    "text",
    [
        HEAD,
        HEAD + "passes: [{pass: quantize_weights, name: a, after: source, bits: 4, timeout_s: 3}]\n",
        HEAD + "passes: [{pass: export_onnx}, {group: onnx-cleanup, name: g, after: export_onnx}]\n",
        HEAD + "passes: [{pass: './my_pass.py:MyPass', anything: [1], measure: false}]\n",
        HEAD + "matrix: [{seed: 1}, {}]\n",
        HEAD + "matrix: {cross: {seed: [1, 2]}}\n",
        HEAD + "gates: ['source.decode_tokens_per_s{batch: 1} >= 1.5']\n",
        "extends: llama2-cpu\nname: y\n",
    ],
)
def test_what_loads_fits_the_schema(text: str, fits: Callable[[str], bool]) -> None:
    assert recipes_from_text(text, file="r.yaml", folder=Path())
    assert fits(text)


@pytest.mark.parametrize(
    "text",
    [
        "version: 1\nname: x\n",
        "version: 2\nname: x\nmodel: {builtin: a}\n",
        "version: 1\nname: x\nmodel: {}\n",
        "version: 1\nname: x\nmodel: {builtin: a, path: b}\n",
        HEAD + "sed: 1\n",
        HEAD + "passes: [{name: a}]\n",
        HEAD + "passes: [{pass: quantize_weights, bit: 4}]\n",
        HEAD + "passes: [{pass: quantize_weights, bits: 5}]\n",
        HEAD + "passes: [{pass: quantize}]\n",
        HEAD + "passes: [{group: a, bits: 4}]\n",
        HEAD + "passes: [{group: a, pass: quantize_weights}]\n",
        HEAD + "matrix: []\n",
        HEAD + "matrix: [3]\n",
        HEAD + "matrix: {seed: [1]}\n",
        HEAD + "matrix: {cross: {}}\n",
        HEAD + "matrix: {cross: {seed: 1}}\n",
        HEAD + "matrix: [{extends: a}]\n",
        HEAD + "gates: [source.sise_bytes > 1]\n",
        HEAD + "gates: [source.size_bytes]\n",
        HEAD + "evaluate: {workload: {batch_sizes: []}}\n",
        "extends: [a]\n",
    ],
)
def test_what_does_not_load_does_not_fit_the_schema(text: str, fits: Callable[[str], bool]) -> None:
    with pytest.raises(RecipeError):
        for recipe in recipes_from_text(text, file="r.yaml", folder=Path()):
            check_parameters(recipe, Registry())
    assert not fits(text)


def test_a_misspelt_parameter_in_a_group_does_not_fit_its_schema(group_schema: dict) -> None:
    group = {"version": 1, "passes": [{"pass": "quantize_weights", "bit": 4}]}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(group, group_schema)
