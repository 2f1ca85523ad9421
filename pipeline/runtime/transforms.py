"""Module transforms of torch artifacts: functions that change a loaded model, by name and parameters.

An artifact lists them; the torch runner applies them, in their order, when it has loaded the checkpoint. They are found
in the entry-point group `pipeline.transforms`: `name = "package.module:function"`. The function takes the module, in
eval mode on the CPU, and the parameters, and changes the module in place.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from pipeline.artifact import Artifact, canonical_json
from pipeline.code_digest import code_digest
from pipeline.errors import PipelineError, did_you_mean

TRANSFORMS = "pipeline.transforms"

Transform = Callable[..., None]


def with_transform(artifact: Artifact, name: str, **params: Any) -> Artifact:
    """The torch artifact with one more module transform, which runners apply when they load it.

    What the transform computes enters the artifact: a model is never scored by figures of an older transform.

    Raises: PipelineError where no transform has that name, the artifact is not torch's, or a parameter is no JSON.
    """
    if artifact.format != "torch":
        raise PipelineError(f"module transforms are for torch artifacts; this one is {artifact.format}")
    try:
        canonical_json(params)
    except (TypeError, ValueError) as error:
        raise PipelineError(f"parameters of the transform {name!r} cannot be put into JSON: {error}") from error
    entry = {"transform": name, "params": params, "code": code_digest(_load(name))}
    transforms = (*artifact.manifest.transforms, entry)
    return Artifact(artifact.manifest.model_copy(update={"transforms": transforms}), artifact.blobs)


def apply_transforms(model: Any, artifact: Artifact) -> None:
    """Change the loaded module as the artifact says.

    Raises: PipelineError where a transform is not installed, is another than when the artifact was made, or fails.
    """
    for entry in artifact.manifest.transforms:
        name = str(entry.get("transform"))
        transform = _load(name)
        if code_digest(transform) != entry.get("code"):
            raise PipelineError(
                f"the module transform {name!r} is not the one that this artifact was made with",
                hint="run the recipe again, or install the version of its package that made it",
            )
        try:
            transform(model, **entry.get("params", {}))
        except Exception as error:  # a stranger's code may raise anything
            raise PipelineError(f"the module transform {name!r} failed: {type(error).__name__}: {error}") from error


@cache
def _points() -> dict[str, list[EntryPoint]]:
    found: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=TRANSFORMS):
        same = found.setdefault(point.name, [])
        if all(point.value != other.value for other in same):  # a package may be found twice on the path
            same.append(point)
    return found


def _load(name: str) -> Transform:
    points = _points().get(name, [])
    if not points:
        raise PipelineError(
            f"the module transform {name!r} is not installed", hint=did_you_mean(name, _points(), noun="transforms")
        )
    if len(points) > 1:
        owners = " and ".join(f"{p.value} ({p.dist.name if p.dist else p.module})" for p in points)
        raise PipelineError(f"two module transforms are named {name!r}: {owners}", hint="uninstall one of them")
    try:
        transform: Transform = points[0].load()
    except Exception as error:  # a stranger's module may raise anything
        raise PipelineError(
            f"the module transform {name!r} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    return transform
