"""What goes to a worker and what comes back."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from pipeline.artifact import Artifact, Frozen, Manifest
from pipeline.file_pass import CodeFile

REQUEST = "request.json"
RESULT = "result.json"


class Request(Frozen):
    """One stage, as a worker process gets it."""

    stage: str
    pass_name: str
    code: CodeFile | None = None
    params: dict[str, Any]
    artifact: Manifest | None  # None for the source, whose weights are drawn from a seed
    inputs: dict[str, Manifest]
    facets: dict[str, Any]
    threads: int
    blobs: str
    observer: str | None = Field(
        None,
        description="MODULE:NAME of a context manager that is given the request and the folder, is around the pass, "
        "from its import on, and yields a dict of what it saw: for the conformance kit",
    )


class Failure(Frozen):
    """Why a pass could not do its work."""

    message: str
    hint: str | None = None
    disk_full: bool = False
    expected: bool = Field(False, description="the pass raised it for its user, as a PipelineError")


class Answer(Frozen):
    """What a worker writes when it is done: a manifest or a failure."""

    manifest: Manifest | None = None
    failure: Failure | None = None
    rules: dict[str, tuple[int, int]] = Field(default_factory=dict)
    observed: dict[str, Any] = Field(default_factory=dict, description="what the request's observer saw")


def describe(artifact: object) -> str:
    """What a pass returned, for a message."""
    return f"an artifact of format {artifact.format!r}" if isinstance(artifact, Artifact) else type(artifact).__name__
