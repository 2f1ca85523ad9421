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


class Failure(Frozen):
    """Why a pass could not do its work."""

    message: str
    hint: str | None = None
    disk_full: bool = False


class Answer(Frozen):
    """What a worker writes when it is done: a manifest or a failure."""

    manifest: Manifest | None = None
    failure: Failure | None = None
    rules: dict[str, tuple[int, int]] = Field(default_factory=dict)


def describe(artifact: object) -> str:
    """What a pass returned, for a message."""
    return f"an artifact of format {artifact.format!r}" if isinstance(artifact, Artifact) else type(artifact).__name__
