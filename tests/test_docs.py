"""The pages on passes and runners: their code is what the templates write, is installed as it stands, and works."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.new_pass import write_package
from pipeline.recipe.load import recipe_from_text
from pipeline.run import run
from pipeline.runtime import protocol
from pipeline.runtime.protocol import known_formats
from pipeline.store import Store

ROOT = Path(__file__).parent.parent
PASS_PAGE = (ROOT / "docs" / "writing-a-pass.md").read_text()
RUNNER_PAGE = (ROOT / "docs" / "writing-a-runner.md").read_text()


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


def install_package(files: dict[str, str], folder: Path) -> None:
    """What pip leaves behind of a package of single modules, without pip."""
    project = tomllib.loads(files["pyproject.toml"])["project"]
    for name, text in files.items():
        if name.endswith(".py"):
            (folder / name).write_text(text)
    info = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in points.items())]
    (info / "entry_points.txt").write_text("\n".join([*lines, ""]))


def on_path(folder: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(folder), "COLUMNS": "200", "TERM": "dumb"}


def test_the_onnx_rule_on_the_page_is_what_a_new_package_holds(tmp_path: Path) -> None:
    folder = write_package("fuse_silu", into=tmp_path / "new")
    assert blocks(PASS_PAGE, "python")[0] == (folder / "fuse_silu.py").read_text()
    assert tomllib.loads(blocks(PASS_PAGE, "toml")[0]).items() <= points_of(folder).items()


def test_the_module_swap_on_the_page_is_what_a_new_package_holds(tmp_path: Path) -> None:
    folder = write_package("fuse_norms", takes="torch", into=tmp_path / "new")
    assert blocks(PASS_PAGE, "python")[1] == (folder / "fuse_norms.py").read_text()
    written = points_of(folder)["project"]["entry-points"]
    on_page = tomllib.loads(blocks(PASS_PAGE, "toml")[1])["project"]["entry-points"]
    assert on_page.items() <= written.items()


def points_of(folder: Path) -> dict:
    """Only the entry points of a package."""
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    points = project["entry-points"]
    return {"project": {"entry-points": points}}


def test_what_the_command_is_said_to_print_it_prints(tmp_path: Path) -> None:
    command, _, printed = blocks(PASS_PAGE, "console")[0].partition("\n")
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", *command.split()[2:]],
        cwd=tmp_path,
        env=on_path(tmp_path),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == printed


@pytest.mark.slow
@pytest.mark.parametrize(("name", "takes"), [("fuse_silu", "onnx"), ("fuse_norms", "torch")])
def test_a_new_package_passes_its_own_tests_and_the_checks(tmp_path: Path, name: str, takes: str) -> None:
    folder = write_package(name, takes=takes, into=tmp_path / "new")
    site = tmp_path / "site"
    site.mkdir()
    install_package({path.name: path.read_text() for path in folder.iterdir()}, site)
    if takes == "onnx":  # whose test checks the same
        command = [sys.executable, "-m", "pipeline", "passes", "check", name]
        done = subprocess.run(command, env=on_path(site), capture_output=True, text=True, check=True)
        assert plain(done.stdout) == plain(blocks(PASS_PAGE, "console")[1].partition("\n")[2])
        return
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", str(folder)]
    done = subprocess.run(tests, cwd=tmp_path, env=on_path(site), capture_output=True, text=True, check=False)
    assert "1 passed" in done.stdout, done.stdout + done.stderr


def plain(printed: str) -> list[str]:
    """Lines without their seconds, and the rule without its length."""
    lines = [re.sub(r"in [\d.]+ (m?s|min)\b", "in … s", line.rstrip()) for line in printed.splitlines()]
    return [re.sub("─+", "─", line) for line in lines if line]


@pytest.fixture
def bigrams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The package of the page on runners, installed."""
    site = tmp_path / "site"
    site.mkdir()
    install_package(
        {"pyproject.toml": blocks(RUNNER_PAGE, "toml")[0], "bigrams.py": blocks(RUNNER_PAGE, "python")[0]}, site
    )
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", str(site))
    known_formats.cache_clear()
    yield
    known_formats.cache_clear()
    sys.modules.pop("bigrams", None)


@pytest.mark.slow
@pytest.mark.usefixtures("bigrams", "measured_briefly")
def test_the_runner_on_the_page_is_measured_and_scored(tmp_path: Path) -> None:
    small = [
        "evaluate.budget_s=1",
        "evaluate.quality.tokens=600",
        "evaluate.workload.prompt_lengths=[8]",
        "evaluate.workload.new_tokens=4",
    ]
    recipe = recipe_from_text(blocks(RUNNER_PAGE, "yaml")[0], file="r.yaml", folder=tmp_path, overrides=small)
    done = run(recipe, store=Store(tmp_path / "store"), runs=tmp_path / "runs")
    assert done.exit_code == 0
    stage = done.report.stage("count_bigrams")
    assert (stage.status, stage.effect.kind, stage.artifact.format) == ("ran", "conversion", "bigrams")
    assert {point.kind for point in stage.speed} == {"prefill", "decode"}
    assert stage.quality.vs_baseline.verdict == "broken"
    assert stage.quality.perplexity > 1
    assert protocol.runner_version("bigrams") == "1"
