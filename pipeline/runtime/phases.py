"""Models of two phases: one component for prompts and another for single tokens, over one key-value cache."""

from __future__ import annotations

from pydantic import Field, ValidationError

from pipeline.artifact import Artifact, Frozen
from pipeline.errors import PipelineError

PREFILL, DECODE = "prefill", "decode"
"""The components' names, and the roles of the stages that they come from."""

PHASES = "phases"
"""Key of the manifest's execution block."""


class Phases(Frozen):
    """Which component runs a call, by the new tokens that it has: sequences times tokens of each."""

    crossover_tokens: int = Field(ge=1, description="from so many new tokens on, the component for prompts runs")

    def component_for(self, new_tokens: int) -> str:
        """`prefill` or `decode`."""
        return PREFILL if new_tokens >= self.crossover_tokens else DECODE


def phases_of(artifact: Artifact) -> Phases | None:
    """The artifact's phases; None where it has one component.

    Raises: PipelineError where it has two and its execution block does not say when each of them runs.
    """
    if set(artifact.manifest.components) != {PREFILL, DECODE}:
        return None
    try:
        return Phases.model_validate(artifact.manifest.execution.get(PHASES))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, (PHASES, *first["loc"])))
        raise PipelineError(f"execution block: {where}: {first['msg']}") from None
