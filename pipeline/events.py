"""What a run tells while it works."""

from __future__ import annotations

from pipeline.execute import StageResult
from pipeline.plan import Plan


class Events:
    """Does nothing; a display overrides what it shows."""

    def note(self, message: str) -> None:
        """Something that a person should know at once."""

    def plan_made(self, plan: Plan) -> None:
        """The stages are known."""

    def stage_started(self, name: str) -> None:
        """A stage is looked up or made."""

    def stage_progress(self, name: str, fraction: float, message: str) -> None:
        """How far a pass is, from 0 to 1."""

    def stage_ended(self, result: StageResult) -> None:
        """A stage ran, was cached, failed or was skipped."""

    def measuring(self, message: str) -> None:
        """What is measured now. Called between blocks, never during one."""
