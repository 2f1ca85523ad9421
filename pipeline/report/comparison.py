"""comparison.json: two runs, their artifacts measured again side by side. What is unpaired is labelled so."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from pipeline.report.schema import Kind, Part, PointKey, Quality, Ratio

COMPARISON_VERSION: Literal[1] = 1


class Unlike(Part):
    """One thing that the two runs, or one of them and this machine, do not share."""

    what: str
    a: str
    b: str
    here: str | None = Field(None, description="where it is this machine that differs")


class ComparedRun(Part):
    """One of the two runs."""

    folder: str
    recipe: str
    run: str
    created: str
    host: str | None
    model: str | None = None


class ComparedSpeed(Part):
    """Speed of B's stage over that of A's, at one workload point. Above 1: B is faster."""

    kind: Kind
    batch: int
    prompt: int
    new_tokens: int | None = None
    paired: bool = Field(description="false: from the two reports, which share no rounds")
    ratio: Ratio | None = Field(None, description="null: not known")
    a_latency_s: float | None = Field(None, description="median")
    b_latency_s: float | None = Field(None, description="median")
    rounds: int | None = Field(None, description="paired only")
    launches: int | None = Field(None, description="paired only")
    runs_in_history: int | None = Field(
        None, description="unpaired only: runs of equal artifacts that told how much one run differs from the next"
    )
    reason: str | None = Field(None, description="why the ratio is not known, or how it was found")

    @property
    def point(self) -> PointKey:
        return self.kind, self.batch, self.prompt, self.new_tokens


class ComparedQuality(Part):
    """From the two reports: predictions do not depend on the clock, so they are not scored again."""

    a_perplexity: float | None
    b_perplexity: float | None
    perplexity_ratio: float | None = Field(None, description="B over A; null: not comparable, or random weights")
    a_verdict: Quality | None = Field(None, description="against A's baseline")
    b_verdict: Quality | None = Field(None, description="against B's baseline")
    reason: str | None = Field(None, description="why there is no ratio")


class ComparedStage(Part):
    """A stage that both runs have."""

    name: str
    same_artifact: bool = Field(description="the two artifacts are equal, byte for byte: no difference is theirs")
    a_digest: str | None
    b_digest: str | None
    status: Literal["paired", "unpaired", "failed", "absent"] = Field(
        description="failed: not measured again, though its artifacts are there; absent: a run has no artifact of it"
    )
    reason: str | None = Field(None, description="why it was not measured again, or not to the end")
    speed: tuple[ComparedSpeed, ...] = ()
    quality: ComparedQuality | None = None
    size_bytes: tuple[int | None, int | None] = Field(description="A, B")

    def shows(self, point: ComparedSpeed, verdict: str) -> bool:
        """Whether the verdict is shown at a workload point: from rounds that both ran in, of two artifacts."""
        return point.paired and not self.same_artifact and point.ratio is not None and point.ratio.verdict == verdict

    def contradicts(self, point: ComparedSpeed) -> bool:
        """Whether there is a difference where the artifacts have none."""
        return self.same_artifact and point.ratio is not None and point.ratio.verdict in {"faster", "slower"}


class Comparison(Part):
    """Two runs, compared."""

    schema_version: Literal[1] = COMPARISON_VERSION
    id: str
    created: str = Field(description="UTC, ISO 8601")
    a: ComparedRun
    b: ComparedRun
    forced: tuple[Unlike, ...] = Field((), description="what was not comparable and was measured all the same")
    notes: tuple[str, ...] = ()
    host: dict[str, Any] = Field(description="this machine, on which both were measured again")
    threads: tuple[int, int] = Field(description="of A's stages, of B's")
    baseline: str | None = Field(description="of the schedule: a stage of A; null: nothing was measured again")
    budget_s: float
    margin: float
    rounds: int = 0
    launches: int = 0
    noise_floor: dict[str, tuple[float, float]] = Field(
        default_factory=dict, description="workload point -> the baseline against itself"
    )
    stages: tuple[ComparedStage, ...]
    only_in_a: tuple[str, ...] = ()
    only_in_b: tuple[str, ...] = ()

    @property
    def slower(self) -> tuple[str, ...]:
        """Stages of B that were shown to be slower than A's at some workload point.

        Not where both are one artifact, for no pass made that slower, nor where the two share no rounds.
        """
        return tuple(s.name for s in self.stages if any(s.shows(p, "slower") for p in s.speed))

    @property
    def contradicted(self) -> tuple[str, ...]:
        """Stages whose two artifacts are one, and that were timed faster or slower all the same."""
        return tuple(s.name for s in self.stages if any(s.contradicts(p) for p in s.speed))

    def to_json(self) -> str:
        return self.model_dump_json(indent=2) + "\n"
