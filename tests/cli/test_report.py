"""`pipeline report`, and what `pipeline run` leaves beside report.json."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.store import Store

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def ran(cli: Cli, checkpoint: Path, tmp_path: Path, plugins: Path, store: Store) -> tuple[int, str, str]:
    """A run, done."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"version: 1\nname: r\ndescription: <b>bold</b>\nmodel: {{path: {checkpoint}}}\n"
        "passes:\n  - pass: mark\n    value: 3\n"
    )
    return cli("run", recipe, "--no-measure")


def latest(name: str) -> str:
    return (Path("runs/r/latest") / name).read_text()


def test_a_run_writes_its_report_three_times_and_says_where(ran: tuple[int, str, str]) -> None:
    code, out, _ = ran
    folder = Path("runs/r/latest").resolve().name
    assert code == 0
    assert f"report: runs/r/{folder}/report.html  (report.md, report.json)" in out
    assert latest("report.md").startswith("# r\n")
    assert latest("report.html").startswith("<!DOCTYPE html>")
    assert json.loads(latest("report.json"))["recipe"] == "r"


@pytest.mark.usefixtures("ran")
@pytest.mark.parametrize(
    ("option", "file"), [("--html", "report.html"), ("--markdown", "report.md"), ("--json", "report.json")]
)
def test_each_form_is_printed_as_it_was_written(option: str, file: str, cli: Cli) -> None:
    code, out, err = cli("report", "r", option)
    assert (code, out, err) == (0, latest(file), "")


@pytest.mark.usefixtures("ran")
def test_a_report_is_written_to_a_file(cli: Cli) -> None:
    assert cli("report", "r", "--output", "guessed.md") == (0, "", "")
    assert (Path("guessed.md")).read_text().startswith("# ")
    assert cli("report", "r", "--html", "--output", "page.html") == (0, "", "")
    assert Path("page.html").read_text() == latest("report.html")
    assert cli("report", "r", "-o", "page.txt") == (0, "", "")
    shown = cli("report", "r")[1]
    assert [line.rstrip() for line in shown.splitlines()] == Path("page.txt").read_text().splitlines()


@pytest.mark.usefixtures("ran")
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["r", "--html", "--json"], "--html, --markdown and --json exclude each other"),
        (["r", "--output", "."], "--output . is a folder; give a file"),
        (["r", "--output", "no/where.md"], "there is no folder no"),
        (["rr"], "did you mean 'r'?"),
    ],
)
def test_a_wrong_command_line_ends_with_2_and_says_what_is_wrong(arguments: list[str], expected: str, cli: Cli) -> None:
    code, out, err = cli("report", *arguments)
    assert (code, out) == (2, "")
    assert expected in err


@pytest.mark.usefixtures("ran")
def test_a_strangers_description_stays_text() -> None:
    assert "<b>bold" not in latest("report.html") + latest("report.md")
    assert "&lt;b&gt;bold&lt;/b&gt;" in latest("report.html")
    assert "&lt;b&gt;bold&lt;/b&gt;" in latest("report.md")
