"""Writes a small package with a pass that works: where the author of a new one starts."""

from __future__ import annotations

import keyword
import re
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

from pipeline.errors import RecipeError, did_you_mean
from pipeline.plugin import Registry
from pipeline.recipe.names import NAME

TEMPLATES = Path(__file__).parent / "templates" / "new_pass"

SUMMARIES = {
    "onnx": "Make one QuickGelu of each x * sigmoid(x).",
    "torch": "Swap the RMSNorm modules of transformers for torch's own.",
}
"""What the pass does, by what it takes, until its author has it do something else."""


def write_package(name: str, *, takes: str = "onnx", into: Path | None = None) -> Path:
    """Write the package of a pass called `name` and return its folder, by default `name` with - for _ in this one.

    Raises: RecipeError where the name will not do or is taken, or the folder is there.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    if re.match(NAME, name) is None:
        raise RecipeError(
            f"{name!r} cannot name a pass: a name begins with a lower-case letter and goes on with lower-case letters, "
            "digits and _"
        )
    if takes not in SUMMARIES:
        raise RecipeError(f"--takes {takes}: {did_you_mean(takes, SUMMARIES, noun='formats')}")
    registry = Registry()
    if name in registry.names():
        raise RecipeError(f"the pass {name!r} is there already, from {registry.origin(name)}")
    if keyword.iskeyword(name) or name in sys.stdlib_module_names:
        raise RecipeError(f"{name!r} is a word or a module of Python; choose another name")
    if (found := find_spec(name)) is not None and found.origin is not None:
        raise RecipeError(f"{name!r} is the name of an installed module, {found.origin}; choose another")
    folder = into or Path(name.replace("_", "-"))
    if folder.exists():
        raise RecipeError(f"{folder} is there already", hint="--into FOLDER writes elsewhere")
    values = {
        "name": name,
        "package": name.replace("_", "-"),
        "class_name": "".join(part.capitalize() for part in name.split("_")),
        "takes": takes,
        "summary": SUMMARIES[takes],
    }
    files = {
        "pyproject.toml": "pyproject.toml.j2",
        "README.md": "README.md.j2",
        f"{name}.py": f"{takes}.py.j2",
        f"test_{name}.py": "test.py.j2",
    }
    templates = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,  # noqa: S701 - what is written is Python, TOML and Markdown
    )
    folder.mkdir(parents=True)
    try:
        for file, template in files.items():
            (folder / file).write_text(templates.get_template(template).render(values), encoding="utf-8")
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder
