"""What changed between two checkpoints, by tensors, configuration and module transforms; no weights are loaded.

Modules are counted in a process of its own, which builds the model without weights: torch is not imported here.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from math import prod

from pipeline.artifact import Artifact, TensorRef, canonical_json
from pipeline.measure.fingerprint import Place, bytes_of
from pipeline.measure.graph_weights import is_weight
from pipeline.measure.visible import visible
from pipeline.parent import worker_environment

MODULES_S = 120.0
"""How long counting modules may take."""


def changed_tensors(before: Artifact, after: Artifact) -> tuple[int, int]:
    """(tensors of `after` that `before` does not have with that name and these bytes, all)."""
    names, old = _names(after), _names(before)
    changed = sum(1 for part, name in names if (part, name) not in old or not _same_tensor(before, after, part, name))
    return changed, len(names)


def same_tensor_names(before: Artifact, after: Artifact) -> bool:
    return _names(before) == _names(after)


def same_configuration(before: Artifact, after: Artifact) -> bool:
    return canonical_json(before.read_json("config.json")) == canonical_json(after.read_json("config.json"))


def tensor_data_types(artifact: Artifact) -> Counter[str]:
    """Weights by data type; those that share their bytes count once."""
    return Counter(ref.dtype for ref in _weights(artifact).values())


def tensor_parameters(artifact: Artifact) -> int:
    """Numbers in the weights; those that share their bytes count once."""
    return sum(prod(ref.shape) for ref in _weights(artifact).values())


def _weights(artifact: Artifact) -> dict[Place, TensorRef]:
    """Those that are counted in a graph, too."""
    return {
        place_of(artifact, name, ref): ref
        for name, part in artifact.manifest.components.items()
        for ref in part.tensors.values()
        if is_weight(ref.dtype, prod(ref.shape))
    }


def changed_modules(before: Artifact, after: Artifact) -> dict[str, tuple[int, int]]:
    """Modules by class, before and after, where the number changed; empty where transformers cannot build both."""
    counted = count_modules(before, after)
    if not counted:
        return {}
    old, new = counted
    return {name: (old[name], new[name]) for name in sorted(old.keys() | new.keys()) if old[name] != new[name]}


def count_modules(*artifacts: Artifact) -> list[Counter[str]]:
    """Modules by class, of the models that the configurations describe; none where transformers cannot build one."""
    asked = [{"manifest": a.manifest.model_dump(mode="json"), "blobs": str(a.blobs)} for a in artifacts]
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "pipeline.measure.module_count"],
            input=json.dumps(asked),
            capture_output=True,
            text=True,
            env=worker_environment(1),
            timeout=MODULES_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return []
    found = json.loads(done.stdout) if done.returncode == 0 else []
    return [Counter({visible(name): count for name, count in modules.items()}) for modules in found]


def place_of(artifact: Artifact, component: str, ref: TensorRef) -> Place:
    return artifact.manifest.components[component].files[ref.file].digest, ref.offset, ref.length


def _names(artifact: Artifact) -> set[tuple[str, str]]:
    return {(part, name) for part, component in artifact.manifest.components.items() for name in component.tensors}


def _same_tensor(before: Artifact, after: Artifact, component: str, name: str) -> bool:
    """Whether both hold the same values; the bytes are read only where they lie in different places."""
    import numpy as np

    old, new = (a.manifest.components[component].tensors[name] for a in (before, after))
    if (old.dtype, old.shape) != (new.dtype, new.shape):
        return False
    if place_of(before, component, old) == place_of(after, component, new):
        return True
    return np.array_equal(bytes_of(before.tensor(name, component)), bytes_of(after.tensor(name, component)))
