"""Cells of a matrix: which there are, what they change, and how a mistake in one is told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.errors import RecipeError
from pipeline.recipe import load_cells, load_recipe
from pipeline.recipe.load import recipe_from_text, recipes_from_text

HEAD = "version: 1\nname: x\nmodel: {builtin: llama2-tiny}\n"
PASSES = "passes:\n  - pass: export_onnx\n  - pass: quantize_weights\n    name: low\n    bits: 4\n"
RECIPE = HEAD + PASSES
LIST = RECIPE + "matrix:\n  - {passes.low.bits: 8}\n  - seed: 7\n    evaluate.workload.new_tokens: 3\n  - {}\n"
CROSS = RECIPE + "matrix: {cross: {passes.low.bits: [4, 8], seed: [1, 2, 3]}}\n"

Write = Callable[..., Path]
Complaint = Callable[..., str]


def read(text: str, *overrides: str, cell: int | None = None):
    return recipe_from_text(text, file="r.yaml", folder=Path(), overrides=overrides, cell=cell)


def complaint_of(text: str, *overrides: str, cell: int | None = None) -> str:
    with pytest.raises(RecipeError) as caught:
        read(text, *overrides, cell=cell)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_the_first_cell_is_taken_unless_another_is_asked_for() -> None:
    assert read(LIST).stage("low").params == {"bits": 8}
    assert read(LIST, cell=1).stage("low").params == {"bits": 4}
    assert (read(LIST, cell=1).seed, read(LIST, cell=1).evaluate.workload.new_tokens) == (7, 3)
    assert read(LIST, cell=2).seed == 0


def test_a_cell_knows_its_place_and_what_it_changes() -> None:
    cells = [recipe.cell for recipe in recipes_from_text(LIST, file="r.yaml", folder=Path())]
    assert [(c.index, c.of) for c in cells if c] == [(0, 3), (1, 3), (2, 3)]
    assert [c.overrides for c in cells if c] == [
        {"passes.low.bits": 8},
        {"seed": 7, "evaluate.workload.new_tokens": 3},
        {},
    ]


def test_a_recipe_without_a_matrix_is_no_cell() -> None:
    assert read(RECIPE).cell is None
    assert len(recipes_from_text(RECIPE, file="r.yaml", folder=Path())) == 1


def test_a_cross_has_every_combination_and_the_last_key_varies_fastest() -> None:
    cells = recipes_from_text(CROSS, file="r.yaml", folder=Path())
    assert [(c.stage("low").params["bits"], c.seed) for c in cells] == [(4, 1), (4, 2), (4, 3), (8, 1), (8, 2), (8, 3)]


def test_an_override_goes_over_the_cell() -> None:
    assert [c.seed for c in recipes_from_text(LIST, file="r", folder=Path(), overrides=["seed=9"])] == [9, 9, 9]


def test_a_matrix_of_the_base_is_inherited_and_replaced(write: Write) -> None:
    write(base=LIST)
    assert len(load_cells(write(a="extends: base.yaml\n"))) == 3
    assert len(load_cells(write(a="extends: base.yaml\nmatrix: [{seed: 4}]\n"))) == 1


def test_a_cell_reaches_the_stages_of_a_group(write: Write) -> None:
    group = "version: 1\npasses: [{pass: quantize_weights, name: low, bits: 4}]\n"
    text = HEAD + "passes: [{pass: export_onnx}, {group: g.yaml, name: z}]\nmatrix: [{passes.z_low.bits: 8}]\n"
    assert load_recipe(write(r=text, g=group)).stage("z_low").params == {"bits": 8}


def test_a_cell_may_bring_passes_and_groups_of_its_own(write: Write) -> None:
    group = "version: 1\npasses: [{pass: quantize_weights, name: low}]\n"
    text = RECIPE + "matrix:\n  - {}\n  - passes: [{pass: export_onnx}, {group: g.yaml, name: h}]\n"
    assert load_recipe(write(r=text, g=group), cell=1).stage_names == ["source", "export_onnx", "h_low"]


def test_a_cell_that_names_a_model_drops_the_recipes() -> None:
    assert read(RECIPE + "matrix: [{model.path: here}]\n").model.builtin is None


def test_a_place_in_a_cell_is_the_cells(write: Write) -> None:
    recipe = load_recipe(write(r=LIST), cell=1)
    assert str(recipe.location("seed")) == "r.yaml:11:5"
    assert str(recipe.location("passes", 1, "bits")) == "r.yaml:8:5"


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        ("[]", "r.yaml:9:1: the matrix is empty"),
        ("", "r.yaml:9:1: a matrix is a list of mappings or {cross: …}; got None"),
        ("3", "r.yaml:9:1: a matrix is a list of mappings or {cross: …}; got 3"),
        ("[seed]", "r.yaml:9:10: a cell of the matrix is a mapping of dotted keys to values; got 'seed'"),
        ("{seed: [1, 2]}", "r.yaml:9:1: a matrix that is a mapping has the one key `cross`"),
        ("{cross: {seed: [1]}, seed: 1}", "has the one key `cross`"),
        ("{cross: [1]}", "has the one key `cross`"),
        ("{cross: {}}", "the matrix is empty"),
        ("{cross: {seed: 3}}", "r.yaml:9:18: seed: a list of values, at least one; got 3"),
        ("{cross: {seed: []}}", "r.yaml:9:18: seed: a list of values, at least one; got []"),
        ("[{extends: a}]", "r.yaml:9:11: a cell cannot set 'extends'"),
        ("[{matrix: []}]", "a cell cannot set 'matrix'"),
        ("{cross: {version: [1, 2]}}", "a cell cannot set 'version'"),
        ("[{evaluate..threads: 1}]", "r.yaml:9:11: 'evaluate..threads' is no dotted key"),
        ("[{seed: 1}, {seed: x}]", "r.yaml:9:22: seed should be a valid integer"),
        ("[{seed: 1}, {sed: 1}]", "r.yaml:9:22: unknown key 'sed'; did you mean 'seed'?"),
        ("[{seed: 1}, {passes.lo.bits: 8}]", "r.yaml:9:22: no entry 'lo' in passes\n  in cell 1 of the matrix"),
        ("[{seed: 1}, {passes.low.bit: 8}]", "r.yaml:9:22: unknown key 'bit'; did you mean 'bits'?"),
        ("[{seed: 1}, {passes.low.bits: 5}]", "r.yaml:9:22: bits should be 4 or 8; got 5"),
        ("[{seed: 1}, {passes.low.pass: quantize}]", "r.yaml:9:22: unknown pass 'quantize'"),
        ("[{}, {passes.low.after: gone}]", "r.yaml:9:15: low: the stage 'gone' is not there"),
        ("{cross: {" + ", ".join(f"k{i}: [1, 2, 3, 4]" for i in range(40)) + "}}", "1000 are allowed"),
        ("[" + ", ".join(["{}"] * 1001) + "]", "the matrix has 1001 cells; 1000 are allowed"),
    ],
)
def test_a_wrong_matrix_is_refused_with_its_place(matrix: str, expected: str) -> None:
    assert expected in complaint_of(RECIPE + f"matrix: {matrix}\n")


def test_a_mistake_in_a_cell_that_was_not_asked_for_is_seen_and_says_which_cell() -> None:
    told = complaint_of(LIST.replace("seed: 7", "seed: seven"), cell=0)
    assert told.startswith("r.yaml:11:5: seed should be a valid integer")
    assert told.endswith("in cell 1 of the matrix (r.yaml:11:5)")


def test_a_mistake_of_the_recipe_itself_is_not_blamed_on_a_cell() -> None:
    assert "cell" not in complaint_of(LIST + "sed: 1\n")


def test_a_gate_over_a_stage_that_only_another_cell_has_is_refused_and_says_so() -> None:
    text = RECIPE + "gates: [extra.size_bytes > 0]\nmatrix:\n  - {}\n  - passes: [{pass: export_onnx, name: extra}]\n"
    told = complaint_of(text)
    assert told.startswith("r.yaml:9:9: gate 'extra.size_bytes > 0': there is no stage 'extra'")
    assert "cell 1 has it; every cell needs the stages of its gates" in told
    assert "in cell 0 of the matrix" in told


def test_a_cell_may_bring_gates_for_its_own_stages() -> None:
    cell = "passes: [{pass: export_onnx, name: extra}], gates: [extra.size_bytes > 0]"
    text = RECIPE + f"gates: [low.size_bytes > 0]\nmatrix: [{{}}, {{{cell}}}]\n"
    assert [g.stage for g in read(text, cell=1).parsed_gates] == ["extra"]


def test_a_gate_over_an_unknown_metric_in_a_cell_is_refused_at_its_line() -> None:
    told = complaint_of(RECIPE + "matrix:\n  - {}\n  - gates:\n      - low.sise_bytes > 0\n")
    assert told.startswith("r.yaml:12:9: gate 'low.sise_bytes > 0': there is no metric 'sise_bytes'")


@pytest.mark.parametrize("cell", [3, -1])
def test_a_cell_out_of_range_is_answered_with_the_range(cell: int) -> None:
    assert f"there is no cell {cell}: the recipe's matrix has the cells 0 to 2" in complaint_of(LIST, cell=cell)


def test_a_cell_of_a_recipe_without_a_matrix_is_refused() -> None:
    assert "there is no cell 0: the recipe has no matrix" in complaint_of(RECIPE, cell=0)
