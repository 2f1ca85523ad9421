"""A workflow of Microsoft's Olive as a recipe, and what of it could not be carried over. Olive is not imported."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from textwrap import wrap
from typing import Any

import yaml
from pydantic import ValidationError

from pipeline.artifact import Frozen
from pipeline.errors import RecipeError, did_you_mean
from pipeline.plugin import RESERVED, Registry
from pipeline.recipe.names import NAME
from pipeline.recipe.parsing import to_yaml

PASS = "olive"
LARGEST_FILE = 4_000_000  # bytes; a workflow is written by a person
MODEL_TYPES = ("HfModel", "ONNXModel")
TASKS = ("text-generation-with-past", "text-generation")
SEARCHED = frozenset({"SEARCHABLE_VALUES", "DEFAULT_VALUE"})
"""What Olive takes for a value: a search over its own values, or its default."""

REASONS = {
    "search_strategy": "a recipe runs what it says; `matrix:` lists variants",
    "evaluators": "every stage is measured against the baseline; `evaluate:` says how",
    "evaluator": "every stage is measured against the baseline; `evaluate:` says how",
    "evaluate_input_model": "the untouched model is the baseline",
    "data_configs": "calibration reads the calibration text, quality the held-out text",
    "data_root": "there are no data configurations",
    "auto_optimizer_config": "it lets Olive choose the passes",
    "cache_dir": "the store keeps what was made",
    "cache_config": "the store keeps what was made",
    "clean_cache": "`pipeline cache gc` clears the store",
    "output_dir": "results go to ./runs; `--runs FOLDER` changes that",
    "log_severity_level": "each stage has its log",
    "log_to_file": "each stage has its log",
    "host": "stages run on this machine",
    "engine": "a recipe has no engine",
    "packaging_config": "`model/` of a run holds the exported model",
    "plot_pareto_frontier": "the report has one",
    "azureml_client": "nothing is run elsewhere",
    "workflow_host": "stages run on this machine",
}
"""Keys of a workflow that have no place in a recipe, and why."""


class Imported(Frozen):
    """A recipe's text, and what of the workflow is not in it."""

    text: str
    left_out: tuple[str, ...]


def import_olive(file: Path, *, recipe_folder: Path, registry: Registry) -> Imported:
    """The recipe of the workflow in `file`, to be written into `recipe_folder`.

    Raises: RecipeError where the file is no workflow, or has no model or no pass that a recipe can name.
    """
    workflow = read_workflow(file)
    left_out: list[str] = []
    recipe: dict[str, Any] = {
        "version": 1,
        "name": re.sub(r"[^A-Za-z0-9._-]+", "-", str(workflow.get("workflow_id") or file.stem)).strip("-._") or PASS,
        "description": f"from {file.name}, a workflow of Olive",
    }
    model, task = _model(workflow, file, recipe_folder, left_out)
    recipe["model"] = model
    recipe["hardware"] = _hardware(workflow, left_out)
    recipe["passes"] = _stages(workflow, file, task, registry, left_out)
    for key in workflow:
        if key in REASONS:
            left_out.append(f"{key}: {REASONS[key]}")
        elif key not in {"input_model", "passes", "systems", "target", "workflow_id"}:
            left_out.append(f"{key}: a recipe has nothing of that name")
    return Imported(text=_text(recipe, file, left_out), left_out=tuple(left_out))


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"the key {twice!r} stands twice")
    return dict(pairs)


def read_workflow(file: Path) -> dict[str, Any]:
    """The mapping in a file of JSON or YAML.

    Raises: RecipeError where there is none.
    """
    try:
        if file.stat().st_size > LARGEST_FILE:
            raise RecipeError(f"{file} has {file.stat().st_size} bytes; a workflow has at most {LARGEST_FILE}")
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise RecipeError(f"{file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{file} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    try:
        data = json.loads(text, object_pairs_hook=_no_key_twice) if file.suffix == ".json" else yaml.safe_load(text)
    except json.JSONDecodeError as error:
        raise RecipeError(f"{file}:{error.lineno}:{error.colno}: this is not JSON: {error.msg}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{file}:{mark.line + 1}:{mark.column + 1}" if mark else str(file)
        raise RecipeError(f"{where}: this is not YAML: {error.problem}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise RecipeError(f"{file} cannot be read: {str(error).partition(chr(10))[0]}") from None
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise RecipeError(f"{file} holds no workflow", hint="a workflow is a mapping with input_model and passes")
    for key in ("input_model", "passes"):
        if key not in data:
            known = did_you_mean(key, data, noun="its keys")
            raise RecipeError(f"{file} is no workflow of Olive: it lacks {key!r}", hint=known)
    return data


def _config(entry: Any, what: str, file: Path) -> dict[str, Any]:
    """An entry with the keys of its `config` beside its own, as Olive takes both.

    Raises: RecipeError where it is no mapping.
    """
    if not isinstance(entry, Mapping) or not isinstance(entry.get("config") or {}, Mapping):
        raise RecipeError(f"{file}: {what} should be a mapping; got {_shown(entry)}")
    return {**{k: v for k, v in entry.items() if k != "config"}, **(entry.get("config") or {})}


def _model(
    workflow: dict[str, Any], file: Path, recipe_folder: Path, left_out: list[str]
) -> tuple[dict[str, Any], str | None]:
    """(the recipe's model, Olive's task where it is one of ours)."""
    given = workflow["input_model"]
    if isinstance(given, str):
        given = {"type": "HfModel", "model_path": given}
    config = _config(given, "input_model", file)
    kind = str(config.pop("type", "HfModel"))
    known = next((name for name in MODEL_TYPES if name.lower() == kind.lower()), None)
    path = config.pop("model_path", None)
    if known is None:
        hint = did_you_mean(kind, MODEL_TYPES, noun="what a recipe can start from")
        raise RecipeError(f"{file}: input_model is a {kind}, which no recipe can start from", hint=hint)
    if not isinstance(path, str) or not path:
        raise RecipeError(f"{file}: input_model has no model_path; got {_shown(path)}")
    local = (file.parent / path).expanduser()
    model: dict[str, Any]
    if known == "ONNXModel":
        graph = local / str(config.pop("onnx_file_name")) if "onnx_file_name" in config else local
        model = {"onnx": _relative(graph, recipe_folder)}
    elif local.is_dir() or path.startswith((".", "/", "~")):
        model = {"path": _relative(local, recipe_folder)}
    else:
        model = {"huggingface": path}
    task = config.pop("task", None)
    load = config.pop("load_kwargs", None)
    for key, value in (load if isinstance(load, Mapping) else {}).items():
        if key in {"torch_dtype", "dtype"} and value in {"auto", "float32", "bfloat16", "float16"}:
            model["dtype"] = value
        else:
            left_out.append(f"input_model.load_kwargs.{key}: {_shown(value)}")
    left_out += [f"input_model.{key}: {_shown(value)}" for key, value in config.items()]
    if task is not None and task not in TASKS:
        left_out.append(f"input_model.task: {_shown(task)}; recipes are for text generation")
    return model, task if task in TASKS else None


def _relative(path: Path, folder: Path) -> str:
    """The path as a recipe in `folder` says it."""
    return Path(os.path.relpath(path.absolute(), folder.absolute())).as_posix()


def _hardware(workflow: dict[str, Any], left_out: list[str]) -> str:
    systems = workflow.get("systems")
    target = workflow.get("target")
    entries = systems if isinstance(systems, Mapping) else {}
    system = entries.get(target) if isinstance(target, str) else target
    if system is None and len(entries) == 1:
        system = next(iter(entries.values()))
    devices: set[str] = set()
    for name, entry in entries.items():
        if entry is not system:
            left_out.append(f"systems.{name}: a recipe has one machine")
    if isinstance(system, Mapping):
        config = {**system, **(system.get("config") or {})} if isinstance(system.get("config"), Mapping) else system
        if str(config.get("type", "LocalSystem")).lower() != "localsystem":
            left_out.append(f"systems: {config.get('type')}: stages run on this machine")
        for accelerator in config.get("accelerators") or ():
            if isinstance(accelerator, Mapping):
                devices.add(str(accelerator.get("device", "cpu")).lower())
                providers = accelerator.get("execution_providers") or ()
                others = [p for p in providers if p != "CPUExecutionProvider"] if isinstance(providers, list) else []
                if others:
                    left_out.append(f"systems: {', '.join(map(str, others))}: the hardware profile says what runs it")
    if others := sorted(devices - {"cpu"}):
        left_out.append(f"systems: the device {', '.join(others)}: `pipeline hardware` lists profiles; this is `local`")
    return "local"


def _stages(
    workflow: dict[str, Any], file: Path, task: str | None, registry: Registry, left_out: list[str]
) -> list[dict[str, Any]]:
    passes = workflow["passes"]
    if not isinstance(passes, Mapping) or not passes:
        raise RecipeError(f"{file}: passes should be a mapping of names to passes; got {_shown(passes)}")
    stages: list[dict[str, Any]] = []
    for given, entry in passes.items():
        if isinstance(entry, list):
            if len(entry) > 1:
                left_out.append(
                    f"passes.{given}: the alternatives after the first of {len(entry)}; write them as branches"
                )
            entry = entry[0] if entry else None  # noqa: PLW2901
        config = _config(entry, f"passes.{given}", file)
        kind = config.pop("type", None)
        if not isinstance(kind, str):
            raise RecipeError(f"{file}: passes.{given} has no type; got {_shown(kind)}")
        name = _stage_name(str(given), {stage["name"] for stage in stages})
        stage = _stage(str(given), kind, config, task=task, registry=registry, left_out=left_out)
        if stage is not None:
            stages.append({"pass": PASS, "name": name, **stage})
            if name != given:
                left_out.append(f"passes.{given}: the name; the stage is called {name}")
    if not stages:
        reasons = "\n  ".join(left_out)
        raise RecipeError(f"{file}: none of its passes can be a stage", hint=reasons)
    return stages


def _stage(
    given: str, kind: str, config: dict[str, Any], *, task: str | None, registry: Registry, left_out: list[str]
) -> dict[str, Any] | None:
    """The entry's keys besides pass and name; None where the pass cannot be a stage."""
    stage: dict[str, Any] = {"type": kind}
    for key, value in config.items():
        if isinstance(value, str) and value in SEARCHED:
            left_out.append(f"passes.{given}.{key}: {value}, which leaves the value to Olive")
        elif isinstance(value, Mapping) and value.get("olive_parameter_type") == "SearchParameter":
            left_out.append(f"passes.{given}.{key}: a search over values")
        elif key in RESERVED or key in {"task", "calibration_samples", "calibration_length"}:
            left_out.append(f"passes.{given}.{key}: the name means something else in a recipe")
        elif value is not None:
            stage[key] = value
    params = registry.load(PASS).Params
    if task is not None and not _problems(params, {"type": kind, "task": task}):
        stage["task"] = task
    for _ in range(len(stage) + 1):
        problems = _problems(params, stage)
        if not problems:
            return stage
        for key, why in problems.items():
            if key in {"", "type"} or key not in stage:
                left_out.append(f"passes.{given}: {why}")
                return None
            left_out.append(f"passes.{given}.{key}: {why}")
            del stage[key]
    return None


def _problems(params: Any, stage: dict[str, Any]) -> dict[str, str]:
    """Key -> what is wrong with its value."""
    try:
        params.model_validate_json(json.dumps(stage))
    except ValidationError as error:
        details = error.errors(include_url=False, include_context=False)
        return {str(d["loc"][0]) if d["loc"] else "": d["msg"].removeprefix("Value error, ") for d in details}
    except (TypeError, ValueError):
        return {"": "it holds what JSON does not"}
    return {}


def _stage_name(given: str, taken: set[str]) -> str:
    """A valid name for a stage, near the given one."""
    name = re.sub(r"[^a-z0-9]+", "_", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", given).lower()).strip("_")
    if not re.fullmatch(NAME, name) or name == "source":
        name = f"stage_{name}".rstrip("_")
    count, tried = 2, name
    while tried in taken:
        tried, count = f"{name}_{count}", count + 1
    return tried


def _text(recipe: dict[str, Any], file: Path, left_out: list[str]) -> str:
    """The recipe with what was left out as comments before it."""
    lines = [f"# From {file.name}, a workflow of Olive, by `pipeline import-olive`."]
    if left_out:
        lines.append("# Not carried over:")
        for reason in left_out:
            lines += wrap(" ".join(reason.split()), 115, initial_indent="#   - ", subsequent_indent="#     ")
    return "\n".join(lines) + "\n" + to_yaml(recipe)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "…"
