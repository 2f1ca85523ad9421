"""The rules of the house: imports go down only, heavy libraries load late, passes know only the public names."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "pipeline"

FLOORS = [
    ["pipeline", "errors", "artifact", "files", "parent", "onnx_wire", "file_pass", "code_digest", "hardware"],
    ["installed"],
    ["report.schema", "report.figures", "report.verdicts", "report.gates"],
    ["store", "plugin", "stored_tensor", "onnx_model", "models", "runtime", "memory_estimate"],
    ["recipe", "measure", "passes_catalogue", "further_passes", "starter", "new_pass", "import_olive"],
    ["plan"],
    ["execute", "resolve", "why"],
    ["events", "evaluate", "divergences", "remembered"],
    ["report"],
    ["run_folder", "ablation"],
    ["run", "reproduce", "diff", "diff_page"],
    ["comparable"],
    ["unpaired"],
    ["compare", "cells"],
    ["testing"],
    ["cli", "__main__"],
]
HEAVY = {"numpy", "torch", "transformers", "onnxruntime", "onnx", "onnx_ir", "onnxscript", "scipy", "olive", "pandas"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def floor_of(module: str) -> int:
    """The floor of a module: that of the longest name in FLOORS that it begins with."""
    inner = module.removeprefix("pipeline").removeprefix(".") or "pipeline"
    best = max(
        (name for names in FLOORS for name in names if inner == name or inner.startswith(name + ".")),
        key=len,
        default=None,
    )
    assert best is not None, f"{module} has no floor: give it one"
    return next(i for i, names in enumerate(FLOORS) if best in names)


def imports_of(path: Path, *, top_level_only: bool) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = list(_top_level(tree)) if top_level_only else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def _top_level(tree: ast.Module) -> list[ast.stmt]:
    """Statements that run on import; what stands under TYPE_CHECKING does not."""
    return [n for n in tree.body if not (isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n.test))]


MODULES = sorted(p for p in PACKAGE.rglob("*.py"))
PASSES = sorted((ROOT / "passes").rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_go_down_only(path: Path) -> None:
    module = module_name(path)
    if module == "pipeline":  # its names load on first use, from every floor
        return
    for imported in imports_of(path, top_level_only=False):
        if imported == "pipeline" or not imported.startswith("pipeline."):
            continue
        assert floor_of(imported) <= floor_of(module), f"{module} reaches up to {imported}"


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_the_engine_never_imports_a_pass(path: Path) -> None:
    assert not {m for m in imports_of(path, top_level_only=False) if m.partition(".")[0] == "passes"}


@pytest.mark.parametrize("path", PASSES, ids=module_name)
def test_passes_import_only_public_names(path: Path) -> None:
    import pipeline

    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "pipeline":
            assert node.module == "pipeline"
            assert {alias.name for alias in node.names} <= set(pipeline.__all__)


@pytest.mark.parametrize("path", PASSES, ids=module_name)
def test_passes_import_heavy_libraries_late(path: Path) -> None:
    assert not {m.partition(".")[0] for m in imports_of(path, top_level_only=True)} & HEAVY


@pytest.mark.parametrize(
    "statement",
    [
        "import pipeline.cli",
        "from pipeline.run import run",
        "from pipeline.recipe import load_recipe; from pipeline.resolve import plan_recipe; "
        "plan_recipe(load_recipe('llama2-cpu'))",
        "from pipeline.plugin import Registry; r = Registry(); [r.load(n) for n in r.names()]",
        "import pipeline.cli.live, pipeline.report.terminal, pipeline.recipe.json_schema",
    ],
)
@pytest.mark.usefixtures("store")
def test_what_answers_at_once_loads_no_heavy_library(statement: str) -> None:
    code = f"{statement}\nimport sys\nprint([m for m in {sorted(HEAVY)} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_there() -> None:
    import pipeline

    assert all(getattr(pipeline, name) is not None for name in pipeline.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = pipeline.nonsense


def test_no_module_is_a_bag() -> None:
    assert not {p.stem for p in MODULES + PASSES} & {"utils", "helpers", "common", "misc"}
