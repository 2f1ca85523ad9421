"""`pipeline diff`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.store import Store

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def ran(cli: Cli, checkpoint: Path, tmp_path: Path, plugins: Path, store: Store) -> None:
    """A run of two stages after the source: one marks the execution block, one changes nothing."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"version: 1\nname: r\nmodel: {{path: {checkpoint}}}\npasses: [{{pass: mark}}, {{pass: same}}]\n")
    assert cli("run", recipe, "--no-measure")[0] == 0


def test_differences_are_printed(cli: Cli) -> None:
    code, out, err = cli("diff", "r", "source", "mark")
    assert (code, err) == (0, "")
    assert out.startswith("source -> mark of r/")
    assert "execution.mark  - -> 1" in out


def test_a_run_is_given_by_its_folder_or_its_id_as_well(cli: Cli) -> None:
    folder = Path("runs/r/latest").resolve()
    outputs = {cli("diff", run, "source", "mark")[1] for run in ("r", str(folder), f"r/{folder.name}")}
    assert len(outputs) == 1
    assert cli("diff", f"r/{folder.name}", "source", "mark")[0] == 0


def test_no_difference_is_no_failure(cli: Cli) -> None:
    code, out, _ = cli("diff", "r", "mark", "same")
    assert code == 0
    assert "They do not differ" in out


def test_as_json(cli: Cli) -> None:
    found = json.loads(cli("diff", "r", "source", "mark", "--json")[1])
    assert found["stages"] == ["source", "mark"]
    assert found["execution"] == {"mark": [None, 1]}
    assert found["effect"]["kind"] == "execution"


def test_as_a_page(cli: Cli) -> None:
    code, out, err = cli("diff", "r", "source", "mark", "--html", "page.html")
    assert (code, out, err) == (0, "", "written to page.html\n")
    assert Path("page.html").read_text().startswith("<!DOCTYPE html>")
    assert json.loads(cli("diff", "r", "source", "mark", "--json", "--html", "both.html")[1])["stages"]
    assert Path("both.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("r", "source", "mrak"), "the run has no stage 'mrak'"),
        (("nothing", "source", "mark"), "there is no run nothing"),
        (("r", "source", "mark", "--html", "no/folder.html"), "there is no folder"),
        (("r", "source", "mark", "--html", "."), "is a folder; give a file"),
    ],
)
def test_what_cannot_be_is_the_command_lines_fault(cli: Cli, arguments: tuple[str, ...], said: str) -> None:
    code, out, err = cli("diff", *arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert "Traceback" not in err


def test_an_artifact_that_left_the_store_says_to_run_again(cli: Cli, store: Store) -> None:
    report = json.loads(Path("runs/r/latest/report.json").read_text())
    store.place("artifacts", report["stages"][1]["artifact"]["digest"]).unlink()
    code, _, err = cli("diff", "r", "source", "mark")
    assert code == 2
    assert "run the recipe r again" in err


def test_a_stage_and_itself_are_no_two_stages(cli: Cli) -> None:
    code, out, err = cli("diff", "r", "mark", "mark")
    assert (code, out) == (2, "")
    assert "both are the stage 'mark'" in err
