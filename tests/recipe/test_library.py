"""What ships with the package is found in a checkout and in an installed wheel."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from pipeline.recipe import library, load_recipe
from pipeline.recipe.library import shipped_groups, shipped_recipes

ROOT = Path(__file__).parents[2]


def test_the_wheel_takes_the_whole_folder_of_recipes_along() -> None:
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert build["force-include"]["recipes"] == "pipeline/data/recipes"


def test_an_installed_package_finds_recipes_and_groups_in_its_own_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "pipeline" / "data" / "recipes"
    (data / "groups").mkdir(parents=True)
    group = "version: 1\npasses: [{pass: export_onnx}]\n"
    (data / "groups" / "only.yaml").write_text(group)
    recipe = "version: 1\nname: x\nmodel: {builtin: llama2-tiny}\npasses: [{group: only}]\n"
    (data / "mine.yaml").write_text(recipe)
    monkeypatch.setattr(library, "__file__", str(tmp_path / "pipeline" / "recipe" / "library.py"))
    assert list(shipped_recipes()) == ["mine"]
    assert list(shipped_groups()) == ["only"]
    assert load_recipe("mine").stage_names == ["source", "export_onnx"]
    assert load_recipe("recipes/mine.yaml").stage_names == ["source", "export_onnx"]


def test_a_packages_own_data_goes_before_a_folder_that_lies_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for home in (tmp_path / "pipeline" / "data" / "recipes", tmp_path / "recipes"):
        home.mkdir(parents=True)
        (home / "r.yaml").write_text("")
    monkeypatch.setattr(library, "__file__", str(tmp_path / "pipeline" / "recipe" / "library.py"))
    assert shipped_recipes()["r"].parent == tmp_path / "pipeline" / "data" / "recipes"


def test_every_shipped_file_tells_editors_its_schema() -> None:
    for file in [*shipped_recipes().values(), *shipped_groups().values()]:
        first = file.read_text(encoding="utf-8").splitlines()[0]
        schema = first.removeprefix("# yaml-language-server: $schema=")
        assert schema != first, file
        assert (file.parent / schema).is_file()
