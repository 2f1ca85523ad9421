"""One of an artifact's components by itself."""

from __future__ import annotations

from pipeline.artifact import MAIN_COMPONENT, Artifact
from pipeline.errors import PipelineError
from pipeline.runtime.phases import PHASES


def component_alone(artifact: Artifact, name: str) -> Artifact:
    """The component `name` as an artifact that has no other, with the same interface over the same files.

    Raises: PipelineError where there is no such component.
    """
    parts = artifact.manifest.components
    if name not in parts:
        raise PipelineError(f"the artifact has no component {name!r}; it has {' and '.join(parts) or 'none'}")
    if list(parts) == [MAIN_COMPONENT]:
        return artifact
    execution = {key: value for key, value in artifact.manifest.execution.items() if key != PHASES}
    alone = {"components": {MAIN_COMPONENT: parts[name]}, "execution": execution}
    return Artifact(artifact.manifest.model_copy(update=alone), artifact.blobs)
