"""What Olive says of its passes' parameters: `python -m passes.olive.probe [TYPE …]` prints it as JSON.

A process of its own, for `import olive` takes seconds and hundreds of megabytes. Of a pass that cannot be imported it
says why.
"""

from __future__ import annotations

import json
import os
import sys
from enum import Enum
from typing import Any


def main(types: list[str]) -> int:
    os.environ["CI"] = "1"  # before the import: without, Olive sends telemetry
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answer:
        os.dup2(2, 1)
        json.dump(describe(types), answer, sort_keys=True)
    return 0


def describe(types: list[str]) -> dict[str, Any]:
    """Type -> its parameters, or the error that its import raised. All types where none is given."""
    import olive
    from olive.package_config import OlivePackageConfig

    config = OlivePackageConfig.load_default_config()
    names = {module.module_path.rpartition(".")[2]: key for key, module in config.passes.items()}
    found: dict[str, Any] = {}
    for name in types or sorted(names):
        try:
            found[name] = {"parameters": _parameters(config.import_pass_module(names[name]))}
        except Exception as error:  # whatever a module does when a library is not there
            found[name] = {
                "error": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}",
                "module": getattr(error, "name", None),
            }
    return {"version": olive.__version__, "types": found}


def _parameters(cls: Any) -> dict[str, Any]:
    from olive.hardware import DEFAULT_CPU_ACCELERATOR

    return {
        name: {
            "schema": schema_of(param.type_),
            "required": bool(param.required),
            "category": str(getattr(param.category, "value", param.category)),
            "default": _plain(param.default_value),
            "description": " ".join((param.description or "").split()),
        }
        for name, param in cls.default_config(DEFAULT_CPU_ACCELERATOR).items()
    }


def schema_of(annotation: Any) -> dict[str, Any]:
    """JSON Schema of a parameter's type, without what only documents; {} where any value will do."""
    from pydantic import TypeAdapter

    try:
        schema = TypeAdapter(annotation).json_schema()
    except Exception:  # a type of Olive's own, or a callable
        return {}
    trimmed: dict[str, Any] = _trimmed(schema, schema.get("$defs", {}))
    return trimmed


def _trimmed(schema: Any, definitions: dict[str, Any]) -> Any:
    if not isinstance(schema, dict):
        return {}
    if "$ref" in schema:
        target = definitions.get(schema["$ref"].rpartition("/")[2], {})
        return _trimmed(target, definitions) if "enum" in target else {"type": "object"}
    if "enum" in schema or "const" in schema:
        return {"enum": schema.get("enum", [schema.get("const")])}
    if "anyOf" in schema:
        return {"anyOf": [_trimmed(inner, definitions) for inner in schema["anyOf"]]}
    kind = schema.get("type")
    if kind == "array":
        items = schema.get("items")
        return {"type": "array", "items": _trimmed(items, definitions)} if items else {"type": "array"}
    return {"type": kind} if kind else {}


def _plain(value: Any) -> Any:
    """A default as JSON has it; None where it is computed or an object."""
    if isinstance(value, Enum):
        value = value.value
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError):
        return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
