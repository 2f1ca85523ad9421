"""The reference pages and the JSON Schemas say what the code says; the examples in them work."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import jsonschema
import pytest
import yaml

from pipeline.plugin import Registry
from pipeline.recipe import load_cells
from pipeline.recipe.load import recipe_from_text
from pipeline.recipe.parameters import check_parameters
from pipeline.report.gates import METRICS

ROOT = Path(__file__).parent.parent
TOOL = ROOT / "tools" / "write_docs.py"
RECIPE_PAGE = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
PASSES_PAGE = (ROOT / "docs" / "passes.md").read_text(encoding="utf-8")


def yaml_blocks(page: str) -> list[str]:
    return re.findall(r"^```yaml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("write_docs", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def examples(tmp_path: Path) -> Path:
    """The files that docs/recipe.md shows, each named by its first line."""
    for block in yaml_blocks(RECIPE_PAGE):
        name = block.splitlines()[0].removeprefix("# ")
        (tmp_path / name).write_text(block, encoding="utf-8")
    return tmp_path


def test_pages_and_schemas_are_what_the_code_would_write() -> None:
    done = subprocess.run([sys.executable, TOOL, "--check"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_a_stale_page_is_noticed_and_not_touched(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "docs"
    shutil.copytree(ROOT / "docs", copy)
    monkeypatch.setattr(tool, "DOCS", copy)
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    monkeypatch.setattr(tool, "RECIPES", tmp_path)
    stale = copy.joinpath("passes.md").read_text().replace("export_onnx", "export_onyx")
    copy.joinpath("passes.md").write_text(stale)
    assert tool.main(["--check"]) == 1
    said = capsys.readouterr().out
    assert "docs/passes.md is stale; run `python tools/write_docs.py`" in said
    assert "recipe.schema.json is stale" in said
    assert copy.joinpath("passes.md").read_text() == stale
    assert tool.main([]) == 0
    assert tool.main(["--check"]) == 0


def test_every_example_of_the_recipe_page_is_a_recipe_that_loads(examples: Path) -> None:
    loaded = {}
    for file in sorted(examples.glob("*.yaml")):
        if file.name != "widths.yaml":  # the group
            loaded[file.stem] = load_cells(file)
    assert [r.cell.of for r in loaded["crossed"] if r.cell] == [4, 4, 4, 4]
    assert len(loaded["variants"]) == 2
    assert loaded["long"][0].evaluate.workload.prompt_lengths == [256]
    assert loaded["grouped"][0].stage_names[-2:] == ["coarse_int8", "coarse_int4"]
    for recipes in loaded.values():
        for recipe in recipes:
            check_parameters(recipe, Registry())


def test_the_examples_fit_the_json_schemas(examples: Path) -> None:
    for file in examples.glob("*.yaml"):
        kind = "group" if file.name == "widths.yaml" else "recipe"
        schema = json.loads((ROOT / "recipes" / f"{kind}.schema.json").read_text(encoding="utf-8"))
        jsonschema.validate(yaml.safe_load(file.read_text()), schema)


def test_every_pass_has_a_section_with_an_example_that_its_parameters_accept(tool: ModuleType) -> None:
    registry = tool.built_in_passes()
    examples = {yaml.safe_load(block)[0]["pass"]: block for block in yaml_blocks(PASSES_PAGE)}
    assert set(examples) == set(registry.names())
    for name, block in examples.items():
        assert f"\n## {name}\n" in PASSES_PAGE
        for parameter in registry.load(name).Params.model_fields:
            assert f"| `{parameter}` |" in PASSES_PAGE.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        head = "version: 1\nname: x\nmodel: {builtin: llama2-tiny}\npasses:\n"
        text = head + block.replace("STAGE", "source")  # any stage's name will do
        recipe = recipe_from_text(text, file="passes.md", folder=ROOT)
        check_parameters(recipe, registry)


def test_every_metric_of_gates_is_in_the_reference() -> None:
    assert [name for name in METRICS if f"| `{name}` |" not in RECIPE_PAGE] == []


def test_links_and_anchors_of_the_pages_lead_somewhere() -> None:
    for page in ("recipe.md", "passes.md", "hardware.md"):
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        anchors = {
            re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
            for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)
        }
        for link in re.findall(r"\]\(([^)]+)\)", text):
            if link.startswith("#"):
                assert link[1:] in anchors, f"{page}: {link}"
            elif "://" not in link:
                assert (ROOT / "docs" / link).exists(), f"{page}: {link}"
