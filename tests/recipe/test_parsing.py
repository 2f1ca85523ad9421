"""YAML as a tree, and back."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.errors import RecipeError
from pipeline.recipe.parsing import parse, to_yaml
from pipeline.recipe.tree import plain

TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Zl", "Zp"))) | st.sampled_from(["a\nb", "\t"])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=10
)


def read(text: str) -> Any:
    node = parse(text, "f.yaml")
    return None if node is None else plain(node)[0]


@given(VALUES)
@example({"a": "1e3", "b": "2020-01-01", "c": "<<", "d": "yes", "e": "0x1F", "f": 1e-7, "g": "~", "<<": "x"})
def test_what_is_written_is_what_is_read(value: Any) -> None:
    again = read(to_yaml(value))
    assert again == value
    assert type(again) is type(value)


def test_every_value_knows_its_line_and_column() -> None:
    node = parse("a:\n  - b: 1\n    c: [2, 3]\n", "f.yaml")
    assert node is not None
    positions = plain(node)[1]
    assert str(positions.find(("a",))) == "f.yaml:1:1"
    assert str(positions.find(("a", 0))) == "f.yaml:2:5"
    assert str(positions.find(("a", 0, "c", 1))) == "f.yaml:3:12"
    assert str(positions.find(("a", 0, "c", 9, "gone"))) == "f.yaml:3:5"


@pytest.mark.parametrize(
    ("opening", "times"),
    [("[", 100_000), ("{a: ", 100_000), ("- ", 5_000), ("[", 51)],
    ids=["lists", "mappings", "items", "one too many"],
)
def test_what_is_nested_too_deep_is_refused_before_it_ends_the_process(opening: str, times: int) -> None:
    with pytest.raises(RecipeError, match=r"^f\.yaml:1:\d+: mappings and lists are nested more than 50 deep"):
        parse(opening * times, "f.yaml")


def test_what_is_nested_as_deep_as_a_person_would_is_read() -> None:
    assert read("[" * 40 + "]" * 40)


def test_a_file_of_many_lists_of_the_same_list_is_refused() -> None:
    text = "a: &a [" + ", ".join(["1"] * 400) + "]\nb: [" + ", ".join(["*a"] * 400) + "]\n"
    with pytest.raises(RecipeError, match=r"f\.yaml:1:.*too many values"):
        parse(text, "f.yaml")


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Any) -> None:
    from pipeline.recipe import load_recipe

    file = tmp_path / "r.yaml"
    file.write_text("version: 1\nname: x\nmodel: {builtin: llama2-tiny}\n", encoding="utf-8-sig")
    assert load_recipe(file).name == "x"
