"""`pipeline compare`, `pipeline run --ablate` and the report over all cells, called as a person would."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pipeline.run
from pipeline.cells import CellsFolder
from pipeline.compare import COMPARISONS
from pipeline.recipe import schema
from pipeline.report.cells_report import CellsReport

pytestmark = pytest.mark.usefixtures("plugins", "store")

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def recipe(checkpoint: Path, tmp_path: Path) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(
        f"version: 1\nname: r\nmodel: {{path: {checkpoint}}}\npasses:\n  - pass: mark\n  - pass: write\n"
        "matrix: [{passes.mark.value: 1}, {passes.mark.value: 2, passes.write.text: abc}, {passes: [{pass: refuse}]}]\n"
    )
    return path


def latest() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path("runs/r/latest/report.json").read_text())
    return found


def test_the_end_of_the_chain_may_be_named_or_not_and_the_option_may_stand_anywhere(cli: Cli, recipe: Path) -> None:
    for arguments, end in (
        (("--ablate", recipe), "write"),
        ((recipe, "--ablate"), "write"),
        ((recipe, "--ablate", "mark"), "mark"),
    ):
        code, _, err = cli("run", *arguments, "--no-measure")
        assert (code, err.count("error")) == (0, 0)
        assert latest()["ablation"]["stage"] == end


def test_an_ablation_goes_with_set_and_cell(cli: Cli, recipe: Path) -> None:
    assert cli("run", recipe, "--ablate", "--no-measure", "--cell", "1", "--set", "name=other")[0] == 0
    found = json.loads(Path("runs/other/latest/report.json").read_text())
    assert found["cell"]["index"] == 1
    stages = {stage["name"]: stage["params"] for stage in found["stages"]}
    assert stages["write_without_mark"] == {"text": "abc"}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--ablate", "wrte"), "there is no stage 'wrte'"),
        (("--ablate", "--only", "mark"), "neither --until nor --only"),
        (("mark",), "goes with --ablate only"),
    ],
)
def test_a_wrong_ablation_ends_with_2(arguments: tuple[str, ...], told: str, cli: Cli, recipe: Path) -> None:
    code, _, err = cli("run", recipe, "--no-measure", *arguments)
    assert code == 2
    assert told in err
    assert not Path("runs").exists()


def test_an_ablated_run_is_done_again_as_one(cli: Cli, recipe: Path) -> None:
    assert cli("run", recipe, "--ablate", "--no-measure")[0] == 0
    code, out, _ = cli("reproduce", "r", "--no-measure", "--json")
    assert code == 0
    found = {a["stage"]: a["outcome"] for a in json.loads(out)["artifacts"]}
    assert found == dict.fromkeys(("source", "mark", "write", "write_without_mark"), "same")
    assert latest()["ablation"]["stage"] == "write"


def test_all_cells_have_one_report_beside_those_of_their_runs(cli: Cli, recipe: Path) -> None:
    code, out, _ = cli("run", recipe, "--no-measure", "--cell", "all")
    assert code == 3
    (folder,) = Path("runs/r").glob("cells-*")
    assert {p.name for p in folder.iterdir()} == {"cells.html", "cells.md", "cells.json"}
    assert f"all cells: {folder / 'cells.html'}" in out
    found = CellsReport.model_validate_json((folder / "cells.json").read_bytes())
    assert [c.label for c in found.cells][:2] == ["value 1", "value 2, text abc"]
    assert [(c.exit_code, c.error) for c in found.cells] == [
        (0, None),
        (0, None),
        (3, "refuse failed: this model has no such layer (try another)"),
    ]
    assert found.exit_code == 3
    for cell in found.cells:
        assert (folder / str(cell.run) / "report.html").is_file()


def test_what_ends_the_run_in_the_second_cell_leaves_the_report_over_the_first(
    cli: Cli, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = pipeline.run.run
    calls = []

    def interrupted(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(*arguments, **options)

    monkeypatch.setattr(pipeline.run, "run", interrupted)
    assert cli("run", recipe, "--no-measure", "--cell", "all")[0] == 130
    (folder,) = Path("runs/r").glob("cells-*")
    found = CellsReport.model_validate_json((folder / "cells.json").read_bytes())
    assert ([c.index for c in found.cells], found.of) == ([0], 3)
    assert "Not complete: 1 of 3 cells have been run." in (folder / "cells.md").read_text()
    assert {p.name for p in folder.iterdir()} == {"cells.html", "cells.md", "cells.json"}
    assert not list(Path("runs/r").glob(".cells-*"))


def test_the_report_over_the_cells_spoils_no_json(cli: Cli, recipe: Path) -> None:
    _, out, err = cli("run", recipe, "--no-measure", "--cell", "all", "--json")
    assert len(json.loads(out)) == 3
    assert "all cells: " in err


def test_one_cell_alone_has_no_report_over_cells(cli: Cli, recipe: Path) -> None:
    assert cli("run", recipe, "--no-measure", "--cell", "1")[0] == 0
    assert not list(Path("runs/r").glob("cells-*"))


def test_cells_that_cannot_be_written_leave_nothing(
    cli: Cli, recipe: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from pipeline import cells
    from pipeline.recipe import load_recipe

    def full(report: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(cells, "render_cells_html", full)
    with pytest.raises(KeyboardInterrupt):
        CellsFolder(load_recipe(recipe), tmp_path / "runs").write([], exit_code=0)
    assert list((tmp_path / "runs" / "r").iterdir()) == []


# compare: what it refuses needs no measurement; what it measures is in tests/test_compare.py


@pytest.fixture
def two_runs(cli: Cli, recipe: Path) -> tuple[Path, Path]:
    found = []
    for cell in ("0", "1"):
        assert cli("run", recipe, "--no-measure", "--cell", cell)[0] == 0
        found.append(Path("runs/r/latest").resolve())
    return found[0], found[1]


def test_a_run_that_is_not_there_ends_with_2(cli: Cli, two_runs: tuple[Path, Path]) -> None:
    code, _, err = cli("compare", "r", "nothing")
    assert (code, "there is no run nothing" in err) == (2, True)


def test_the_same_run_twice_ends_with_2(cli: Cli, two_runs: tuple[Path, Path]) -> None:
    code, _, err = cli("compare", "r", two_runs[1])
    assert (code, "both are the same run" in err) == (2, True)


def test_runs_that_are_not_comparable_end_with_2_and_every_difference(cli: Cli, two_runs: tuple[Path, Path]) -> None:
    report = two_runs[1] / "report.json"
    data = json.loads(report.read_text())
    data["host"]["cpu_model"], data["threads"] = "Another CPU", 77
    report.write_text(json.dumps(data))
    code, _, err = cli("compare", *two_runs)
    assert code == 2
    assert "processor: " in err
    assert "Another CPU in RUN_B" in err
    assert "threads: " in err
    assert "77 in RUN_B" in err
    assert "--force" in err
    assert "Traceback" not in err
    assert not Path("runs/comparisons").exists()


def test_a_stage_that_is_in_neither_ends_with_2(cli: Cli, two_runs: tuple[Path, Path]) -> None:
    code, _, err = cli("compare", *two_runs, "--stage", "mrk")
    assert (code, "did you mean 'mark'" in err) == (2, True)


def test_a_budget_of_nothing_ends_with_2(cli: Cli, two_runs: tuple[Path, Path]) -> None:
    assert cli("compare", *two_runs, "--budget", "0")[0] == 2


@pytest.mark.slow
def test_models_that_do_not_load_are_told_and_end_with_3(cli: Cli, two_runs: tuple[Path, Path]) -> None:
    """The checkpoint only looks like a model: real workers are started, and none can load it."""
    code, out, err = cli("compare", *two_runs, "--budget", "1", "--json")
    assert code == 3
    found = json.loads(out)
    assert {s["status"] for s in found["stages"]} == {"failed"}
    assert "Traceback" not in err


def test_no_recipe_takes_the_folder_of_the_comparisons(cli: Cli, recipe: Path) -> None:
    assert schema.COMPARISONS_FOLDER == COMPARISONS
    recipe.write_text(recipe.read_text().replace("name: r\n", "name: Comparisons\n"))
    code, _, err = cli("run", recipe, "--no-measure")
    assert code == 2
    assert "r.yaml:2:1: name: " in err
    assert "no recipe can be named 'Comparisons': that is the folder of what `pipeline compare` writes" in err
    assert not Path("runs").exists()


def test_the_folder_of_the_comparisons_is_no_recipes_name(cli: Cli, recipe: Path) -> None:
    assert cli("run", recipe, "--no-measure")[0] == 0
    made = Path("runs", COMPARISONS, "20260101-000000-abcd")
    made.mkdir(parents=True)
    (made / "comparison.json").write_text("{}")
    (made.parent / "latest").symlink_to(made.name)
    code, _, err = cli("report", COMPARISONS)
    assert code == 2
    assert "recipes with runs in runs: r" in err
    assert "did you mean 'comparisons'" not in err
