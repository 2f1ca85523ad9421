"""`--cell`: one variant of a recipe after the other, each with a run and a report of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.cli.cells import worst

pytestmark = pytest.mark.usefixtures("plugins", "store")

Cli = Callable[..., tuple[int, str, str]]

CELLS = "matrix: [{passes.mark.value: 3}, {passes: [{pass: refuse}]}, {passes.mark.value: 5}]\n"


@pytest.fixture
def recipe(checkpoint: Path, tmp_path: Path) -> Callable[[str], Path]:
    def written(matrix: str) -> Path:
        head = f"version: 1\nname: r\nmodel: {{path: {checkpoint}}}\npasses: [{{pass: mark}}]\n"
        (tmp_path / "r.yaml").write_text(head + matrix)
        return tmp_path / "r.yaml"

    return written


def reports() -> list[dict[str, Any]]:
    """The reports below the current folder, in the order of their cells."""
    found = [json.loads(file.read_text()) for file in Path("runs/r").glob("2*/report.json")]
    return sorted(found, key=lambda report: report["cell"]["index"])


def test_the_first_cell_runs_unless_another_is_asked_for(cli: Cli, recipe: Callable[[str], Path]) -> None:
    assert cli("run", recipe(CELLS), "--no-measure")[0] == 0
    assert [r["cell"] for r in reports()] == [{"index": 0, "of": 3, "overrides": {"passes.mark.value": 3}}]
    assert cli("run", recipe(CELLS), "--no-measure", "--cell", 2)[0] == 0
    assert [r["stages"][1]["params"] for r in reports()] == [{"value": 3}, {"value": 5}]


def test_a_cell_that_fails_stops_no_other_and_decides_the_exit_code(cli: Cli, recipe: Callable[[str], Path]) -> None:
    code, out, _ = cli("run", recipe(CELLS), "--no-measure", "--cell", "all")
    assert code == 3
    assert [r["cell"]["index"] for r in reports()] == [0, 1, 2]
    assert [r["stages"][1]["status"] for r in reports()] == ["ran", "failed", "ran"]
    assert "cell 0 of 0 to 2: passes.mark.value=3" in out
    assert "cell 2 of 0 to 2: passes.mark.value=5" in out


@pytest.mark.usefixtures("no_gpu")
def test_a_cell_that_cannot_run_here_stops_no_other(cli: Cli, recipe: Callable[[str], Path]) -> None:
    cells = "matrix: [{passes: [{pass: needs_gpu}]}, {passes.mark.value: 5}, {passes: [{pass: refuse}]}]\n"
    code, _, err = cli("run", recipe(cells), "--no-measure", "--cell", "all")
    assert code == 4  # before the 3 of the last
    assert "needs a CUDA GPU" in err
    assert [r["cell"]["index"] for r in reports()] == [1, 2]


@pytest.mark.usefixtures("no_gpu")
def test_json_of_all_cells_is_a_list_and_of_one_its_report(cli: Cli, recipe: Callable[[str], Path]) -> None:
    cells = "matrix: [{passes: [{pass: needs_gpu}]}, {passes.mark.value: 5}]\n"
    _, out, _ = cli("run", recipe(cells), "--no-measure", "--cell", "all", "--json")
    failed, ran = json.loads(out)
    assert (failed["cell"]["index"], "needs a CUDA GPU" in failed["error"]) == (0, True)
    assert (ran["cell"]["index"], ran["stages"][1]["status"]) == (1, "ran")
    assert json.loads(cli("run", recipe(cells), "--no-measure", "--cell", 1, "--json")[1])["cell"]["of"] == 2


def test_plan_shows_the_cell_that_is_asked_for_or_each(cli: Cli, recipe: Callable[[str], Path]) -> None:
    keys = [json.loads(cli("plan", recipe(CELLS), "--cell", i, "--json")[1])["stages"][1]["key"] for i in range(3)]
    assert len(set(keys)) == 3
    assert [p["stages"][1]["key"] for p in json.loads(cli("plan", recipe(CELLS), "--cell", "all", "--json")[1])] == keys
    code, out, _ = cli("plan", recipe(CELLS), "--cell", "all")
    assert code == 0
    assert out.index("cell 0 of 0 to 2") < out.index("cell 1 of 0 to 2") < out.index("cell 2 of 0 to 2")


def test_why_is_asked_of_a_cell(cli: Cli, recipe: Callable[[str], Path]) -> None:
    assert cli("run", recipe(CELLS), "--no-measure", "--cell", 2)[0] == 0
    assert cli("why", recipe(CELLS), "mark", "--cell", 2)[1].startswith("mark: cached")
    assert "params.value: 5 -> 3" in cli("why", recipe(CELLS), "mark")[1].replace('"', "")


@pytest.mark.parametrize("verb", [["run"], ["plan"], ["why"]])
@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ("3", "there is no cell 3: the recipe's matrix has the cells 0 to 2"),
        ("one", "--cell takes a number, from 0, or `all`; got 'one'"),
        ("-1", "--cell takes a number, from 0, or `all`; got '-1'"),
    ],
)
def test_a_cell_that_is_not_there_ends_with_2(
    verb: list[str], cell: str, expected: str, cli: Cli, recipe: Callable[[str], Path]
) -> None:
    stage = ["mark"] if verb == ["why"] else []
    code, _, err = cli(*verb, recipe(CELLS), *stage, f"--cell={cell}")
    assert (code, expected in err) == (2, True), err
    assert not Path("runs").exists()


def test_a_recipe_without_a_matrix_has_no_cells_but_all_of_it_runs(cli: Cli, recipe: Callable[[str], Path]) -> None:
    assert cli("plan", recipe(""), "--cell", 0)[0] == 2
    code, out, err = cli("plan", recipe(""), "--cell", "all")
    assert (code, "cell" in out) == (0, False)
    assert err == "the recipe has no matrix: there is one cell only, and no report over cells\n"
    assert cli("plan", recipe(CELLS), "--cell", "all")[2] == ""


def test_a_typo_in_a_cell_that_does_not_run_is_seen_at_once(cli: Cli, recipe: Callable[[str], Path]) -> None:
    code, _, err = cli("run", recipe("matrix: [{}, {passes.mark.valu: 3}]\n"), "--no-measure")
    assert code == 2
    assert "r.yaml:5:15: unknown key 'valu'; did you mean 'value'?" in err
    assert "in cell 1 of the matrix" in err


def test_what_ran_is_kept_as_one_file_that_gives_the_same_keys(
    cli: Cli, recipe: Callable[[str], Path], tmp_path: Path
) -> None:
    deep = tmp_path / "deep"
    deep.mkdir()
    (deep / "note.txt").write_text("a note")
    (deep / "g.yaml").write_text(
        "version: 1\npasses:\n  - {pass: reads, file: note.txt}\n  - {pass: write, text: '1e3'}\n"
    )
    (deep / "base.yaml").write_text("passes:\n  - group: g.yaml\n    name: two\n")
    recipe("extends: deep/base.yaml\nmatrix: [{passes.two_write.timeout_s: 9, seed: 4}]\n")
    whole = (tmp_path / "r.yaml").read_text().replace("passes: [{pass: mark}]\n", "")
    (tmp_path / "r.yaml").write_text(whole)

    assert cli("run", tmp_path / "r.yaml", "--no-measure", "--set", "evaluate.budget_s=7")[0] == 0
    kept = Path("runs/r/latest/recipe.yaml")
    data = yaml.safe_load(kept.read_text())
    assert not {"extends", "matrix"} & set(data)
    assert [entry["name"] for entry in data["passes"]] == ["two_reads", "two_write"]
    assert (data["seed"], data["evaluate"]["budget_s"], data["passes"][1]["timeout_s"]) == (4, 7, 9)

    def keys(file: Path, *more: str) -> list[str]:
        return [stage["key"] for stage in json.loads(cli("plan", file, *more, "--json")[1])["stages"]]

    again = tmp_path / "elsewhere.yaml"
    again.write_text(kept.read_text())
    first = keys(tmp_path / "r.yaml")
    (tmp_path / "r.yaml").unlink()
    (deep / "base.yaml").unlink()
    (deep / "g.yaml").unlink()
    assert keys(again) == first


@pytest.mark.parametrize(
    ("codes", "expected"),
    [([0, 0], 0), ([0, 1, 3], 3), ([1, 4, 3], 4), ([4, 2, 3], 2), ([130, 2], 130), ([1, 0], 1), ([], 0)],
)
def test_of_several_exit_codes_the_gravest_decides(codes: list[int], expected: int) -> None:
    assert worst(codes) == expected
