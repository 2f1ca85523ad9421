"""Groups of passes: spliced in place, under their own or prefixed names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.errors import Location
from pipeline.recipe import Recipe, load_recipe
from pipeline.recipe.groups import MOST_STAGES
from pipeline.recipe.library import shipped_groups
from pipeline.recipe.load import recipe_from_text

HEAD = "version: 1\nname: x\nmodel: {builtin: llama2-tiny}\n"
GROUP = "version: 1\npasses:\n  - pass: q\n    bits: 8\n  - pass: q\n    name: low\n    after: first\n    bits: 4\n"
TWO = HEAD + "passes:\n  - pass: first\n  - group: g.yaml\n"

Write = Callable[..., Path]
Complaint = Callable[..., str]


def chain(recipe: Recipe) -> list[tuple[str, str]]:
    return [(s.name, s.parent) for s in recipe.stages]


def test_a_groups_entries_stand_where_the_group_stood(write: Write) -> None:
    recipe = load_recipe(write(r=TWO + "  - pass: last\n", g=GROUP))
    assert chain(recipe) == [("first", "source"), ("q", "first"), ("low", "first"), ("last", "low")]
    assert [s.params for s in recipe.stages] == [{}, {"bits": 8}, {"bits": 4}, {}]
    assert [s.index for s in recipe.stages] == [0, 1, 2, 3]


def test_a_name_on_the_group_prefixes_its_stages_and_what_they_say_of_each_other(write: Write) -> None:
    group = GROUP + "  - pass: join\n    after: q\n    inputs: {draft: low, whole: first}\n"
    recipe = load_recipe(write(r=TWO + "    name: z\n  - group: g.yaml\n    name: y\n    after: first\n", g=group))
    assert chain(recipe) == [
        ("first", "source"),
        ("z_q", "first"),
        ("z_low", "first"),
        ("z_join", "z_q"),
        ("y_q", "first"),
        ("y_low", "first"),
        ("y_join", "y_q"),
    ]
    assert recipe.stage("y_join").inputs == {"draft": "y_low", "whole": "first"}


def test_a_name_in_a_group_means_its_own_stage_before_the_recipes(write: Write) -> None:
    group = "version: 1\npasses:\n  - {pass: first}\n  - {pass: q, after: first}\n"
    recipe = load_recipe(write(r=TWO + "    name: z\n", g=group))
    assert chain(recipe)[1:] == [("z_first", "first"), ("z_q", "z_first")]


def test_after_on_the_group_is_the_parent_of_its_first_entry_only(write: Write) -> None:
    recipe = load_recipe(write(r=TWO + "    after: source\n", g=GROUP))
    assert chain(recipe)[1:] == [("q", "source"), ("low", "first")]


def test_groups_hold_groups_and_prefixes_add_up(write: Write) -> None:
    outer = "version: 1\npasses:\n  - {pass: p}\n  - {group: ../inner.yaml, name: i}\n  - {pass: s, after: i_a}\n"
    inner = "version: 1\npasses:\n  - {pass: a}\n  - {pass: b, after: p}\n"
    recipe = load_recipe(
        write(r=HEAD + "passes: [{group: deep/outer.yaml, name: o}]\n", deep__outer=outer, inner=inner)
    )
    assert chain(recipe) == [("o_p", "source"), ("o_i_a", "o_p"), ("o_i_b", "o_p"), ("o_s", "o_i_a")]


def test_after_reaches_the_first_entry_through_groups_in_groups(write: Write) -> None:
    outer = "version: 1\npasses:\n  - {group: g.yaml}\n"
    recipe = load_recipe(
        write(r=HEAD + "passes: [{pass: first}, {pass: x}, {group: o.yaml, after: first}]\n", o=outer, g=GROUP)
    )
    assert chain(recipe)[2] == ("q", "first")


def test_overrides_reach_spliced_stages_by_their_full_names(write: Write) -> None:
    recipe = load_recipe(write(r=TWO + "    name: z\n", g=GROUP), ["passes.z_low.bits=2", "passes.z_q.extra=1"])
    assert recipe.stage("z_low").params == {"bits": 2}
    assert recipe.stage("z_q").params == {"bits": 8, "extra": 1}


def test_an_override_may_bring_a_group(write: Write) -> None:
    recipe = load_recipe(write(r=TWO, g=GROUP), ["passes=[{pass: first}, {group: g.yaml, name: n}]"])
    assert recipe.stage_names == ["source", "first", "n_q", "n_low"]


def test_a_group_in_a_base_starts_from_the_bases_folder(write: Write) -> None:
    recipe = load_recipe(write(r="extends: deep/base.yaml\n", deep__base=TWO, deep__g=GROUP))
    assert recipe.location("passes", 1, "bits") == Location("deep/g.yaml", 4, 5)
    assert recipe.folder_of("passes", 1, "bits").name == "deep"


def test_the_same_group_may_stand_in_branches_of_a_nest(write: Write) -> None:
    outer = "version: 1\npasses:\n  - {group: g.yaml, name: one}\n  - {group: g.yaml, name: two}\n"
    recipe = load_recipe(write(r=HEAD + "passes: [{pass: first}, {group: o.yaml}]\n", o=outer, g=GROUP))
    assert recipe.stage_names[2:] == ["one_q", "one_low", "two_q", "two_low"]


@pytest.mark.parametrize("name", sorted(shipped_groups()))
def test_every_shipped_group_is_found_by_its_name_and_has_stages(name: str) -> None:
    text = HEAD + f"passes: [{{group: {name}, name: g}}]\n"
    assert len(recipe_from_text(text, file="r.yaml", folder=Path()).stages) >= 1


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ({"r": TWO}, "r.yaml:6:5: the group 'g.yaml' is not there: "),
        ({"r": HEAD + "passes: [{group: onnx-cleanpu}]\n"}, "did you mean 'onnx-cleanup'? shipped groups: "),
        ({"r": TWO, "g": "version: 1\n"}, "g.yaml:1:1: the key 'passes' is missing"),
        ({"r": TWO, "g": "version: 1\npasses: []\n"}, "g.yaml:2:1: passes should have at least 1 item(s), not 0"),
        ({"r": TWO, "g": "version: 1\npasses: {pass: a}\n"}, "g.yaml:2:1: passes should be a list"),
        ({"r": TWO, "g": "version: 1\npasses: [q]\n"}, "g.yaml:2:10: passes.0 should be a"),
        ({"r": TWO, "g": "version: 2\npasses: [{pass: a}]\n"}, "g.yaml:1:1: version should be 1; got 2"),
        ({"r": TWO, "g": "version: 1\npasses: [{pass: a}]\nname: x\n"}, "g.yaml:3:1: unknown key 'name'"),
        (
            {"r": TWO, "g": "version: 1\npasses: [{pass: a}, {name: b}]\n"},
            "g.yaml:2:21: the key 'pass' is missing",
        ),
        ({"r": TWO, "g": "[]"}, "g.yaml:1:1: a group is a mapping of keys to values"),
        ({"r": TWO + "    bits: 4\n", "g": GROUP}, "r.yaml:7:5: unknown key 'bits'; known names: after, group, name"),
        ({"r": TWO + "    name: Z\n", "g": GROUP}, "r.yaml:7:5: name should begin with a lower-case letter"),
        ({"r": TWO + "    after: 3\n", "g": GROUP}, "r.yaml:7:5: after should be a valid string"),
        ({"r": HEAD + "passes: [{group: 3}]\n"}, "r.yaml:4:11: group should be a valid string; got 3"),
        ({"r": TWO + "    pass: q\n", "g": GROUP}, "r.yaml:7:5: an entry has either `pass` or `group`"),
        ({"r": TWO + "    after: gone\n", "g": GROUP}, "r.yaml:7:5: q: the stage 'gone' is not there"),
        (
            {"r": TWO, "g": GROUP.replace("after: first", "after: gone")},
            "g.yaml:7:5: low: the stage 'gone' is not there",
        ),
        (
            {"r": TWO + "  - pass: q\n", "g": GROUP},
            "r.yaml:7:5: two stages are named 'q'\n  the other is at g.yaml:3:5",
        ),
        (
            {"r": TWO + "  - group: g.yaml\n", "g": GROUP},
            "g.yaml:3:5; give one of them a `name:`, which on a group is the prefix of its stages' names",
        ),
        (
            {"r": TWO, "g": "version: 1\npasses: [{group: h.yaml}]\n", "h": "version: 1\npasses: [{group: g.yaml}]\n"},
            "h.yaml:2:11: groups hold each other in a circle: g.yaml -> h.yaml -> g.yaml",
        ),
        ({"r": TWO, "g": "version: 1\npasses: [{group: g.yaml}]\n"}, "in a circle: g.yaml -> g.yaml"),
    ],
)
def test_a_wrong_group_is_refused_with_its_place(texts: dict[str, str], expected: str, complaint: Complaint) -> None:
    assert expected in complaint(**texts)


def test_groups_in_groups_do_not_fill_the_memory(complaint: Complaint) -> None:
    levels = {f"g{i}": f"version: 1\npasses: [{', '.join([f'{{group: g{i + 1}.yaml}}'] * 10)}]\n" for i in range(6)}
    told = complaint(r=HEAD + "passes: [{group: g0.yaml}]\n", **levels, g6="version: 1\npasses: [{pass: a}]\n")
    assert f"the groups hold more than {MOST_STAGES} passes" in told
