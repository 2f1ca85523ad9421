"""What the README shows is what happens."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.cli import app
from pipeline.recipe.load import recipe_from_text
from pipeline.resolve import plan_recipe
from pipeline.run import run

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_the_recipe_in_the_readme_is_the_shipped_one() -> None:
    shipped = (ROOT / "recipes" / "llama2-cpu.yaml").read_text()
    assert blocks("yaml") == [shipped]


def test_every_command_in_the_readme_exists() -> None:
    import typer.main

    verbs = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    lines = re.findall(r"(?:\$ |`|^    )(pipeline [^`\n]+)", README, re.MULTILINE)
    used = {verb for line in lines if not (verb := line.split()[1]).startswith("--")}
    assert used <= verbs, used - verbs
    assert {"run", "plan", "why", "passes", "schema"} <= used


def test_every_make_target_in_the_readme_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"(?:`|^    )make ([a-z-]+)", README, re.M)) <= targets


def test_every_linked_file_is_there() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert links
    assert all((ROOT / link.partition("#")[0]).exists() for link in links)


@pytest.mark.slow
def test_the_python_in_the_readme_generates_the_text_in_the_readme(tmp_path: Path, main_job: Any) -> None:
    recipe = recipe_from_text(blocks("yaml")[0], file="README.md", folder=ROOT)
    assert plan_recipe(recipe, store=main_job.store).stages
    run(recipe, store=main_job.store, measure=False, runs=tmp_path / "runs")
    code = blocks("python")[0]
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    shown = README.partition(code)[2].split("```")[2]
    # further on, another processor's rounding may lead to another word
    assert done.stdout.splitlines()[0].rstrip() == shown.strip().splitlines()[0]
    assert len([line for line in code.splitlines() if line]) == 10
