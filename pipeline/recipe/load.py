"""From a file to a Recipe: parse, override, validate once, resolve."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import Location, RecipeError, did_you_mean
from pipeline.recipe.positions import Positions, parse
from pipeline.recipe.schema import MODEL_SOURCES, NAME, SOURCE, Gate, Recipe, RecipeModel, Stage, parse_gate
from pipeline.recipe.validation import validate
from pipeline.report.gates import METRICS, SELECTORS


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Load the recipe at `path`, or the shipped recipe of that name, with `KEY=VALUE` overrides applied.

    Raises: RecipeError with the place of every mistake.
    """
    file = _find(Path(path))
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{file} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except OSError as error:
        raise RecipeError(f"{file} cannot be read: {error.strerror}") from None
    return recipe_from_text(text, file=str(path), folder=file.parent, overrides=overrides)


def recipe_from_text(text: str, *, file: str, folder: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML text. `file` is what messages call it; relative paths start from `folder`.

    Raises: RecipeError
    """
    data, positions = parse(text, file)
    if data is None:
        raise RecipeError("the file is empty; a recipe begins with `version: 1`", location=Location(file, 1, 1))
    if not isinstance(data, dict):
        raise RecipeError("a recipe is a mapping of keys to values", location=Location(file, 1, 1))
    for override in overrides:
        apply_override(data, override, positions)
    if "version" in data and data["version"] != 1:
        raise RecipeError(
            f"this is a recipe of version {data['version']!r}; this program reads version 1",
            location=positions.find(("version",)),
        )
    checked = validate(RecipeModel, data, positions)
    stages = _stages(checked, positions)
    gates = _gates(checked, stages, positions)
    fields = {name: getattr(checked, name) for name in RecipeModel.model_fields}
    recipe = Recipe.model_construct(**fields, stages=stages, parsed_gates=gates)
    recipe._positions, recipe._folder, recipe._text = positions, folder.resolve(), text
    return recipe


def shipped_recipes() -> dict[str, Path]:
    """Name -> file of the recipes that come with the package."""
    package = Path(__file__).parent.parent
    folders = [package / "data" / "recipes", package.parent / "recipes"]
    return {f.stem: f for folder in reversed(folders) for f in sorted(folder.glob("*.yaml"))}


def _find(path: Path) -> Path:
    if path.is_file():
        return path
    if path.is_dir():
        raise RecipeError(f"{path} is a folder; give the recipe's file")
    shipped = shipped_recipes()
    # `recipes/llama2-cpu.yaml` means the shipped recipe, too, where an installed package has no such folder beside it
    if path.parent in {Path(), Path("recipes")} and path.stem in shipped:
        return shipped[path.stem]
    raise RecipeError(f"there is no recipe {path}", hint=did_you_mean(path.stem, shipped, noun="shipped recipes"))


def apply_override(data: dict[str, Any], override: str, positions: Positions) -> None:
    """Set one dotted key, such as `passes.int4.bits=8`. Stages go by name; the value is YAML.

    Raises: RecipeError where the text is not KEY=VALUE or names a stage that is not there.
    """
    key, equals, text = override.partition("=")
    label = f"--set {override}"
    here = Location(label, 0, 0)
    if not equals or not key.strip():
        raise RecipeError("an override is KEY=VALUE, for example evaluate.budget_s=20", location=here)
    value, _ = parse(text, label)
    path: list[str | int] = []
    current: Any = data
    parts = key.strip().split(".")
    for part in parts[:-1]:
        step = _step(current, part, path, here)
        if isinstance(current, dict):
            if not isinstance(current.get(step), dict | list):
                current[str(step)] = {}
                positions.put((*path, step), here)
            current = current[str(step)]
        else:
            current = current[step]
        path.append(step)
    last = _step(current, parts[-1], path, here)
    if path == ["model"] and last in MODEL_SOURCES:
        for other in [*MODEL_SOURCES, "revision"]:
            current.pop(other, None)
    current[last] = value
    full = (*path, last)
    positions.forget(full)
    positions.put(full, here)


def _step(current: Any, part: str, path: list[str | int], here: Location) -> str | int:
    """The key or index that `part` means inside `current`."""
    if isinstance(current, dict):
        return part
    if not isinstance(current, list):
        raise RecipeError(f"{'.'.join(map(str, path))} has no keys", location=here)
    names = [_entry_name(entry) for entry in current]
    if part in names:
        return names.index(part)
    if part.isdigit() and int(part) < len(current):
        return int(part)
    raise RecipeError(
        f"no entry {part!r} in {'.'.join(map(str, path))}", location=here, hint=did_you_mean(part, filter(None, names))
    )


def _entry_name(entry: Any) -> str:
    return str(entry.get("name") or entry.get("pass") or "") if isinstance(entry, dict) else ""


def _stages(recipe: RecipeModel, positions: Positions) -> list[Stage]:
    stages: list[Stage] = []
    before = SOURCE
    for i, entry in enumerate(recipe.passes):
        name = entry.name or entry.pass_
        where = ("passes", i, "name" if entry.name else "pass")
        known = [SOURCE, *(s.name for s in stages)]
        if re.match(NAME, name) is None:
            raise RecipeError(
                f"{name!r} cannot name a stage",
                location=positions.find(where),
                hint="give the entry a `name:` of a-z, 0-9 and _",
            )
        if name == SOURCE:
            raise RecipeError("the name 'source' is reserved for the untouched model", location=positions.find(where))
        if name in known:
            raise RecipeError(
                f"two stages are named {name!r}", location=positions.find(where), hint="give one of them a `name:`"
            )
        later = [e.name or e.pass_ for e in recipe.passes[i:]]
        for role, stage in {"after": entry.after or before, **entry.inputs}.items():
            if stage not in known:
                key = ("passes", i, "after") if role == "after" else ("passes", i, "inputs", role)
                what = "comes later in the list" if stage in later else "is not there"
                what = "is the one that asks for it" if stage == name else what
                raise RecipeError(
                    f"{name}: the stage {stage!r} {what}",
                    location=positions.find(key),
                    hint=did_you_mean(stage, known, noun="stages before it"),
                )
        stages.append(
            Stage(
                name=name,
                pass_name=entry.pass_,
                params=dict(entry.model_extra or {}),
                parent=entry.after or before,
                inputs=entry.inputs,
                allow_broken=entry.allow_broken,
                timeout_s=entry.timeout_s,
                index=i,
            )
        )
        before = name
    known = [SOURCE, *(s.name for s in stages)]
    for path, given in ((("evaluate", "baseline"), recipe.evaluate.baseline), (("export",), recipe.export)):
        if given is not None and given not in known:
            raise RecipeError(
                f"{'.'.join(path)}: there is no stage {given!r}",
                location=positions.find(path),
                hint=did_you_mean(given, known, noun="stages"),
            )
    return stages


def _gates(recipe: RecipeModel, stages: list[Stage], positions: Positions) -> list[Gate]:
    known = [SOURCE, *(s.name for s in stages)]
    gates = []
    for i, text in enumerate(recipe.gates):
        where = positions.find(("gates", i))
        try:
            gate = parse_gate(text)
        except ValueError as error:
            raise RecipeError(str(error), location=where) from None
        if gate.stage not in known:
            hint = did_you_mean(gate.stage, known, noun="stages")
            raise RecipeError(f"gate {text!r}: there is no stage {gate.stage!r}", location=where, hint=hint)
        if gate.metric not in METRICS:
            raise RecipeError(
                f"gate {text!r}: there is no metric {gate.metric!r}",
                location=where,
                hint=did_you_mean(gate.metric, METRICS, noun="metrics"),
            )
        for key, value in gate.selector.items():
            if not METRICS[gate.metric].by_point:
                raise RecipeError(f"gate {text!r}: {gate.metric} has no workload points to select", location=where)
            if key not in SELECTORS:
                hint = did_you_mean(key, SELECTORS, noun="selectors")
                raise RecipeError(f"gate {text!r}: there is no selector {key!r}", location=where, hint=hint)
            if not value.isdigit():
                raise RecipeError(f"gate {text!r}: {key} should be a number of tokens or sequences", location=where)
        gates.append(gate)
    return gates
