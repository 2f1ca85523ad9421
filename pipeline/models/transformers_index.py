"""What the installed transformers knows, read from its sources: importing it takes seconds, a plan has none to spare.

Everything here is a courtesy: where the sources look otherwise than expected nothing is known, and what is wrong is
said later, by transformers itself.
"""

from __future__ import annotations

import ast
from functools import cache
from importlib.util import find_spec
from pathlib import Path

LEGACY_FIELDS = frozenset({"rope_theta", "rope_scaling", "partial_rotary_factor", "num_labels", "torch_dtype"})
"""Names of older configurations that every newer one translates."""


@cache
def causal_language_models() -> dict[str, str]:
    """model_type -> class of its causal language model; empty where it cannot be found out."""
    return _pairs("models/auto/modeling_auto.py", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES")


@cache
def configurations() -> dict[str, str]:
    """model_type -> class of its configuration; empty where it cannot be found out."""
    name = "CONFIG_MAPPING_NAMES"
    return _pairs("models/auto/auto_mappings.py", name) or _pairs("models/auto/configuration_auto.py", name)


def is_known(model_type: str) -> bool:
    """Whether there is such an architecture. Most have a folder of their name: seeing it is quicker than parsing."""
    spec = find_spec("transformers")
    name = model_type.replace("-", "_")
    if spec is not None and spec.origin is not None and name.isidentifier():
        folder = Path(spec.origin).parent / "models" / name
        if (folder / f"configuration_{name}.py").is_file():
            return True
    return model_type in configurations()


@cache
def configuration_fields(model_type: str) -> frozenset[str]:
    """Names that the configuration of `model_type` takes; empty where they cannot be found out."""
    wanted = configurations().get(model_type)
    folder = model_type.replace("-", "_")
    classes = _classes(f"models/{folder}/configuration_{folder}.py")
    common = _classes("configuration_utils.py")
    if wanted not in classes or not (common.keys() & {"PreTrainedConfig", "PretrainedConfig"}):
        return frozenset()
    known = {**common, **classes}
    found: set[str] = set(LEGACY_FIELDS)
    waiting = [wanted]
    while waiting:
        node = known.get(waiting.pop())
        if node is None:
            continue
        found |= _fields(node)
        for base in node.bases:
            if not isinstance(base, ast.Name):
                continue
            if base.id not in known and not base.id.endswith("Mixin"):  # of another module: not all is known
                return frozenset()
            waiting.append(base.id)
    return frozenset(name for name in found if not name.startswith("_"))


def _fields(node: ast.ClassDef) -> set[str]:
    """Annotated fields, arguments of `__init__`, and other names for them."""
    found: set[str] = set()
    for part in node.body:
        if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
            if "ClassVar" not in ast.dump(part.annotation):
                found.add(part.target.id)
        elif isinstance(part, ast.FunctionDef) and part.name == "__init__":
            found |= {argument.arg for argument in (*part.args.args[1:], *part.args.kwonlyargs)}
        elif isinstance(part, ast.Assign) and any(
            isinstance(t, ast.Name) and t.id == "attribute_map" for t in part.targets
        ):
            keys = part.value.keys if isinstance(part.value, ast.Dict) else []
            found |= {key.value for key in keys if isinstance(key, ast.Constant) and isinstance(key.value, str)}
    return found


def _pairs(file: str, name: str) -> dict[str, str]:
    """The mapping of strings that `name = OrderedDict([…])` makes in a source file."""
    for node in _parse(file):
        if not (isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and node.value.args):
            continue
        if _assigns(node, name):
            try:
                return {str(key): str(value) for key, value in ast.literal_eval(node.value.args[0])}
            except ValueError:  # not written as plain pairs
                return {}
    return {}


def _assigns(node: ast.Assign, name: str) -> bool:
    return any(isinstance(target, ast.Name) and target.id == name for target in node.targets)


def _classes(file: str) -> dict[str, ast.ClassDef]:
    return {node.name: node for node in _parse(file) if isinstance(node, ast.ClassDef)}


def _parse(file: str) -> list[ast.stmt]:
    spec = find_spec("transformers")
    if spec is None or spec.origin is None:
        return []
    try:
        return ast.parse((Path(spec.origin).parent / file).read_text(encoding="utf-8")).body
    except (OSError, SyntaxError):
        return []
