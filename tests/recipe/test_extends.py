"""Recipes that extend others: what merges, what replaces, and where mistakes are told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import Location, RecipeError
from pipeline.recipe import load_recipe
from pipeline.recipe.extends import merge
from pipeline.recipe.load import recipe_from_text
from pipeline.recipe.tree import placed, plain

HEAD = "version: 1\nname: x\nmodel: {builtin: llama2-tiny}\n"
BASE = HEAD + "passes:\n  - pass: a\n  - pass: b\n    bits: 4\nevaluate:\n  budget_s: 60\n  workload: {new_tokens: 8}\n"

Write = Callable[..., Path]
Complaint = Callable[..., str]


def test_mappings_merge_and_lists_replace(write: Write) -> None:
    child = "extends: base.yaml\nname: y\nevaluate: {workload: {batch_sizes: [2]}}\npasses: [{pass: c}]\n"
    recipe = load_recipe(write(child=child, base=BASE))
    assert recipe.name == "y"
    assert recipe.model.builtin == "llama2-tiny"
    assert (recipe.evaluate.budget_s, recipe.evaluate.workload.new_tokens) == (60, 8)
    assert recipe.evaluate.workload.batch_sizes == [2]
    assert recipe.stage_names == ["source", "c"]


def test_a_recipe_of_three_levels_takes_the_nearest_value(write: Write) -> None:
    recipe = load_recipe(
        write(
            top="extends: deep/middle.yaml\nseed: 3\n",
            deep__middle="extends: ../base.yaml\nseed: 2\nname: m\n",
            base=BASE + "seed: 1\n",
        )
    )
    assert (recipe.seed, recipe.name, recipe.evaluate.budget_s) == (3, "m", 60)


def test_a_shipped_recipe_is_extended_by_its_name(write: Write) -> None:
    recipe = load_recipe(write(mine="extends: llama2-cpu\nname: mine\nevaluate: {budget_s: 5}\n"))
    assert recipe.evaluate.budget_s == 5
    assert "int4" in recipe.stage_names


def test_a_recipe_may_have_the_name_of_the_shipped_one_that_it_extends(write: Write) -> None:
    write(**{"llama2-cpu": "extends: llama2-cpu\nname: mine\n"})
    assert load_recipe("llama2-cpu.yaml").stage_names == load_recipe("llama2-cpu").stage_names


def test_a_model_replaces_the_bases_and_all_that_was_said_of_it(write: Write) -> None:
    base = HEAD.replace("{builtin: llama2-tiny}", "{huggingface: a/b, revision: main, dtype: float32}")
    model = load_recipe(write(child="extends: base.yaml\nmodel: {path: here}\n", base=base)).model
    assert (model.path, model.huggingface, model.revision, model.dtype) == ("here", None, None, "float32")


def test_trust_in_a_bases_code_is_not_trust_in_another_models(write: Write) -> None:
    base = HEAD.replace("{builtin: llama2-tiny}", "{huggingface: a/b, trust_remote_code: true}")
    child = "extends: base.yaml\nmodel: {huggingface: c/d}\n"
    assert load_recipe(write(child=child, base=base)).model.trust_remote_code is False


def test_every_value_remembers_the_file_that_says_it(write: Write) -> None:
    recipe = load_recipe(write(child="extends: deep/base.yaml\nseed: 1\n", deep__base=BASE))
    assert recipe.location("seed") == Location("child.yaml", 2, 1)
    assert recipe.location("passes", 1, "bits") == Location("deep/base.yaml", 7, 5)
    assert recipe.location("evaluate", "budget_s") == Location("deep/base.yaml", 9, 3)


def test_relative_paths_start_from_the_folder_of_the_file_that_says_them(write: Write, tmp_path: Path) -> None:
    base = HEAD.replace("builtin: llama2-tiny", "path: model") + "hardware: h.yaml\n"
    child = "extends: deep/base.yaml\nhardware: mine.yaml\n"
    recipe = load_recipe(write(child=child, deep__base=base), ["evaluate.quality.text=t.txt"])
    assert recipe.folder_of("model", "path") == tmp_path / "deep"
    assert recipe.folder_of("hardware") == tmp_path
    assert recipe.folder_of("evaluate", "quality", "text") == tmp_path  # an override's: the recipe's own


def test_a_mistake_in_the_base_names_the_bases_line(complaint: Complaint) -> None:
    told = complaint(child="extends: base.yaml\n", base=BASE + "  budgt_s: 3\n")
    assert told.startswith("base.yaml:11:3: unknown key 'budgt_s'; did you mean 'budget_s'?")


def test_mistakes_in_both_files_are_told_with_their_own_places(complaint: Complaint) -> None:
    told = complaint(child="extends: base.yaml\nseed: x\n", base=BASE + "hardware: 3\n")
    assert "base.yaml:11:1: hardware should be a valid string" in told
    assert "child.yaml:2:1: seed should be a valid integer" in told


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ({"r": "extends: r.yaml\n"}, "r.yaml:1:1: recipes extend each other in a circle: r.yaml -> r.yaml"),
        (
            {"r": "extends: a.yaml\n", "a": "name: a\nextends: b.yaml\n", "b": "extends: ./a.yaml\n"},
            "b.yaml:1:1: recipes extend each other in a circle: a.yaml -> b.yaml -> a.yaml",
        ),
        ({"r": "name: x\nextends: gone.yaml\n"}, "r.yaml:2:1: the recipe 'gone.yaml' is not there: "),
        ({"r": "extends: lama2-cpu\n"}, "did you mean 'llama2-cpu'? shipped recipes: "),
        ({"r": "extends: .\n"}, "is a folder"),
        ({"r": "extends: [a, b]\n"}, "r.yaml:1:1: extends takes the path of a recipe, or a shipped one's name"),
        ({"r": "extends: ''\n"}, "extends takes the path of a recipe"),
        ({"r": "extends: a.yaml\n", "a": "- 1\n"}, "a.yaml:1:1: a recipe is a mapping of keys to values"),
        ({"r": "extends: a.yaml\n", "a": ""}, "a.yaml:1:1: a recipe is a mapping of keys to values"),
        ({"r": "extends: a.yaml\n", "a": "version: 9\n"}, "a.yaml:1:1: this is a recipe of version 9"),
        ({"r": "extends: a.yaml\n", "a": "a: [1\nb: 2\n"}, "a.yaml:2:2: not YAML"),
        ({"r": "extends: a.yaml\n", "a": "a: 1\na: 2\n"}, "a.yaml:2:1: the key 'a' stands twice"),
        ({"r": "extends: a.yaml\n", "a": "a: &a [*a]\n"}, "too many values, or itself"),
        ({"r": "extend: llama2-cpu\n"}, "unknown key 'extend'; did you mean 'extends'?"),
        ({"r": "extends: a.yaml\n", "a": "version: 1\n"}, "the key 'name' is missing"),
    ],
)
def test_a_wrong_base_is_refused_with_its_place(texts: dict[str, str], expected: str, complaint: Complaint) -> None:
    assert expected in complaint(**texts)


def test_a_base_that_is_not_text_is_refused_at_the_place_that_names_it(write: Write, tmp_path: Path) -> None:
    child = write(child="name: x\nextends: base.yaml\n")
    (tmp_path / "base.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match=r"^child\.yaml:2:1: .*base\.yaml is not UTF-8 text"):
        load_recipe(child)


def test_a_file_that_no_person_wrote_is_not_read(write: Write, tmp_path: Path) -> None:
    child = write(child="extends: base.yaml\n")
    (tmp_path / "base.yaml").write_text("#" * 5_000_000)
    with pytest.raises(RecipeError, match="a recipe has at most 4000000"):
        load_recipe(child)


def test_a_device_is_no_base() -> None:
    with pytest.raises(RecipeError, match="is no ordinary file"):
        recipe_from_text("extends: /dev/zero\n", file="r.yaml", folder=Path())


def test_a_recipe_in_a_text_extends_relative_to_its_folder(write: Write, tmp_path: Path) -> None:
    write(base=BASE)
    recipe = recipe_from_text("extends: base.yaml\nseed: 5\n", file="README.md", folder=tmp_path)
    assert (recipe.seed, recipe.name) == (5, "x")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=12,
)
MAPPINGS = st.dictionaries(st.sampled_from("abcd"), VALUES, max_size=4)


def merged(*layers: Any) -> Any:
    result = placed(layers[0], Location("f", 1, 1))
    for layer in layers[1:]:
        result = merge(result, placed(layer, Location("f", 1, 1)))
    return plain(result)[0]


@given(MAPPINGS)
def test_an_empty_layer_changes_nothing(a: dict) -> None:
    assert merged(a, {}) == merged({}, a) == merged(a, a) == a


SHAPED = st.dictionaries(
    st.sampled_from("ab"), st.dictionaries(st.sampled_from("abc"), st.integers() | st.lists(st.integers(), max_size=2))
)


@given(SHAPED, SHAPED, SHAPED)
def test_layers_may_be_merged_from_either_end(a: dict, b: dict, c: dict) -> None:
    assert merged(merged(a, b), c) == merged(a, merged(b, c))


@given(MAPPINGS, MAPPINGS)
def test_the_upper_layer_is_in_the_result_as_it_is(a: dict, b: dict) -> None:
    def within(part: Any, whole: Any) -> bool:
        if isinstance(part, dict):
            return isinstance(whole, dict) and all(k in whole and within(v, whole[k]) for k, v in part.items())
        return bool(part == whole)

    result = merged(a, b)
    assert within(b, result)
    assert set(result) == set(a) | set(b)
