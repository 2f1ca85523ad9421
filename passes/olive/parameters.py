"""The parameters of Olive's passes, and whether an entry of a recipe gives them rightly.

Olive itself only warns of a name that it does not know. What its passes take is known without importing it: for the
version that this was tested with there is a file beside this module; for another, Olive is asked once, in a process of
its own, and the answer is kept in the cache folder.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import cache, reduce
from operator import or_
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError, create_model
from pydantic_core import InitErrorDetails, PydanticCustomError

from passes.olive.catalogue import olive_version
from pipeline import HostError, Parameter, PassParams, default_store_path, did_you_mean

REFUSED = {
    "user_script": "it would run Python code from a file",
    "script_dir": "it would run Python code from a folder",
}
DATA = ("data_config", "calibration_data_config", "train_data_config")
"""Olive's names for what a pass reads besides the model; a stage reads the calibration text."""

TIMEOUT_S = 300


def parameters_of(name: str) -> dict[str, Any] | None:
    """Parameter -> its schema, whether it is required, default and description. None: nobody could tell.

    Raises: HostError where Olive cannot be asked.
    """
    return _table(olive_version()).get(name)


@cache
def _table(version: str) -> dict[str, Any]:
    shipped = Path(__file__).parent / f"parameters-{version}.json"
    kept = default_store_path() / "olive" / f"parameters-{version}.json"
    for path in (shipped, kept):
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return found
        except (OSError, ValueError):
            continue
    answer = ask_olive()
    table = {name: told["parameters"] for name, told in answer["types"].items() if "parameters" in told}
    if table.keys() == answer["types"].keys():  # a package that is missing today may be there tomorrow
        kept.parent.mkdir(parents=True, exist_ok=True)
        aside = kept.with_name(f".{kept.name}.{os.getpid()}")
        aside.write_text(json.dumps(table), encoding="utf-8")
        aside.replace(kept)
    return table


def in_words(name: str) -> tuple[Parameter, ...] | None:
    """The parameters that an entry may give, those that it has to give first. None: nobody could tell."""
    described = parameters_of(name)
    if described is None:
        return None
    given = {key: told for key, told in described.items() if _why_not(key, told) is None}
    return tuple(
        Parameter.of_schema(
            key,
            told["schema"],
            default="required" if told["required"] else json.dumps(told["default"]),
            description=" ".join((told["description"] or "").split()),
        )
        for key, told in sorted(given.items(), key=lambda item: not item[1]["required"])
    )


def ask_olive(*types: str) -> dict[str, Any]:
    """What the installed Olive says of these passes, or of all: see `passes.olive.probe`. Takes seconds.

    Raises: HostError where it cannot be imported.
    """
    done = subprocess.run(
        [sys.executable, "-P", "-m", "passes.olive.probe", *types],
        env={**os.environ, "CI": "1", "ORT_DISABLE_TELEMETRY": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_S,
    )
    if done.returncode:
        last = done.stderr.strip().rpartition("\n")[2]
        raise HostError(f"Olive {olive_version()} cannot be imported: {last}", hint="pip install olive-ai requests")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def check_parameters(name: str, given: dict[str, Any], *, own: Sequence[str]) -> None:
    """Check what an entry gives to the Olive pass `name`. `own` are further keys that the entry could have.

    Raises: pydantic's ValidationError, with a place for every key that is wrong.
    """
    described = parameters_of(name)
    if described is None:
        return
    errors = [
        _refusal(key, why, value)
        for key, value in given.items()
        if (why := _why_not(key, described.get(key, {}))) is not None
    ]
    known = [key for key in described if key not in REFUSED and key not in DATA]
    errors += [
        InitErrorDetails(
            type=PydanticCustomError(
                "value_error",
                "{message}",
                {"message": f"Olive's {name} has no such parameter; {did_you_mean(key, [*known, *own])}"},
            ),
            loc=(key,),
            input=given[key],
        )
        for key in given
        if key not in described
    ]
    checked = {key: value for key, value in given.items() if key in known}
    try:
        _model_of(name).model_validate_json(json.dumps(checked))
    except ValidationError as error:
        errors += [
            InitErrorDetails(type=d["type"], loc=_place(d["loc"]), input=d["input"], ctx=d.get("ctx", {}))
            for d in error.errors(include_url=False)
        ]
    if errors:
        raise ValidationError.from_exception_data(name, errors)


def _why_not(key: str, told: dict[str, Any]) -> str | None:
    """Why an entry cannot give this parameter of Olive's; None where it can."""
    if key in REFUSED:
        return REFUSED[key]
    if key in DATA:
        return "the pass reads the calibration text instead"
    if told.get("category") == "path":
        return "a file that it names would not be part of the stage's key"
    return None


def _refusal(key: str, why: str, value: Any) -> InitErrorDetails:
    error = PydanticCustomError("value_error", "{message}", {"message": f"cannot be given here: {why}"})
    return InitErrorDetails(type=error, loc=(key,), input=value)


def _place(location: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """The key, and the place in a list; not the branch of a union that did not fit."""
    return tuple(part for i, part in enumerate(location) if i == 0 or isinstance(part, int))


@cache
def _model_of(name: str) -> type[PassParams]:
    """The parameters as a strict model."""
    fields: dict[str, Any] = {}
    for key, told in (parameters_of(name) or {}).items():
        if key in REFUSED or key in DATA:
            continue
        annotation = python_type(told["schema"])
        fields[key] = (annotation, ...) if told["required"] else (annotation | None, None)
    made: type[PassParams] = create_model(name, __base__=PassParams, __config__=None, **fields)
    return made


def python_type(schema: dict[str, Any]) -> Any:
    """The type that takes what a JSON Schema of the table takes."""
    if "enum" in schema:
        return Literal[tuple(schema["enum"])]
    if "anyOf" in schema:
        return reduce(or_, [python_type(inner) for inner in schema["anyOf"]])
    kind = schema.get("type")
    if kind == "array":
        return list[python_type(schema["items"])] if "items" in schema else list[Any]  # type: ignore[misc]
    plain = {
        "boolean": bool,
        "string": str,
        "integer": int,
        "number": float,
        "object": dict[str, Any],
        "null": type(None),
    }
    return plain.get(str(kind), Any)
