"""Raw results of measuring speed: every sample is kept, none is changed."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from pipeline.artifact import Frozen
from pipeline.measure.looks import MARGIN, LookPlan
from pipeline.measure.workload import Point


class Sample(Frozen):
    """One block of one stage in one round."""

    stage: str
    replica: int = Field(default=0, description="1 for the second worker of the baseline, which shows the noise")
    launch: int = Field(description="which set of processes, from 0")
    round: int = Field(description="within the launch, from 0; samples of a round were taken next to each other")
    order: int = Field(description="position within the round of its first visit, shuffled anew each time")
    point: Point
    seconds: tuple[float, ...] = Field(description="of each iteration: a whole batch of prompts, or one token each")
    visits: tuple[int, ...] = Field(
        default=(), description="iterations of each visit that made up the block, between which the others ran"
    )
    started_s: float = Field(description="of its first visit, by the clock of the schedule, monotonic")

    @property
    def latency_s(self) -> float:
        """Mean seconds of an iteration."""
        return sum(self.seconds) / len(self.seconds)


class WarmUpSample(Frozen):
    """The iterations before the first round of a launch."""

    stage: str
    replica: int = 0
    launch: int
    point: Point
    seconds: tuple[float, ...]
    flat: bool = Field(description="False where the cap came first")


class LoadSample(Frozen):
    """One load of an artifact in a new process, without the imports of libraries."""

    stage: str
    replica: int = 0
    launch: int | None = Field(description="None for a load that was made only to be timed")
    load_s: float
    cold: bool = Field(description="True where the artifact's files had been dropped from memory")
    warm: bool = Field(default=False, description="True where all of the artifact's files were in memory already")
    compiled_anew: bool = Field(default=False, description="True where torch.compile found no kernels kept")
    environment: dict[str, Any] = Field(default_factory=dict, description="threads and affinity as the worker saw them")


class StartUp(Frozen):
    """What it took to begin a launch of processes that run side by side, before their first round."""

    launch: int
    group: int = Field(default=0, description="0 where all models fit into memory together")
    processes: int
    import_s: float = Field(description="until all of them had imported their libraries, side by side")
    load_s: float = Field(description="one after the other; without what compiling with nothing kept took")
    warm_up_s: float


class LoadTimes(Frozen):
    """Seconds to load a stage; None where it was not measured."""

    cold_s: float | None = None
    warm_s: float | None = Field(default=None, description="median of the later loads")


class SpeedMeasurement(Frozen):
    """All that was seen while the stages ran."""

    baseline: str
    seed: int
    budget_s: float = Field(default=0.0, description="that was given; cold compilation is not counted")
    plan: LookPlan | None = Field(default=None, description="made before the first timed block; None: none was timed")
    looks_taken: int = Field(default=0, description="0 where the budget ended it before the first, or nothing ran")
    ended: Literal["decided", "looks", "budget", "failed"] | None = Field(
        default=None,
        description="decided: every comparison had a verdict; looks: the last was taken; budget: it was used up; "
        "failed: the baseline, or all the others, had failed",
    )
    fits: bool = Field(
        default=True, description="False: the budget did not hold even the least, which ran; nothing may be claimed"
    )
    launches: int = 0
    rounds: int = Field(default=0, description="in all launches together; with groups, those of the longest")
    round_s: float | None = Field(default=None, description="seconds of a round as the warm-ups foretold them")
    launch_s: float | None = Field(default=None, description="seconds before the first round of a launch, of the first")
    start_ups: tuple[StartUp, ...] = ()
    decode_tokens: dict[str, int] = Field(
        default_factory=dict, description="point -> tokens that a decode block takes after each prompt"
    )
    samples: tuple[Sample, ...] = ()
    warm_ups: tuple[WarmUpSample, ...] = ()
    load_samples: tuple[LoadSample, ...] = ()
    load: dict[str, LoadTimes] = Field(default_factory=dict)
    inference_peak_memory_bytes: dict[str, int] = Field(
        default_factory=dict, description="anonymous and shared memory of the worker while it runs, not while it loads"
    )
    inference_peak_rss_bytes: dict[str, int] = Field(default_factory=dict)
    device_peak_memory_bytes: dict[str, int] = Field(
        default_factory=dict, description="of the CUDA allocator, for the stages that have one"
    )
    failures: dict[str, str] = Field(default_factory=dict, description="stage -> why it was not measured to the end")
    unloadable: tuple[str, ...] = Field(default=(), description="those of the failures whose model does not load")
    logs: dict[str, str] = Field(default_factory=dict, description="stage -> path of its workers' log")
    notes: tuple[str, ...] = Field(default=(), description="what a reader should know about how it went")
    wall_s: float = 0.0

    @property
    def looks(self) -> tuple[int, ...]:
        """Rounds in all at each look, as planned."""
        return () if self.plan is None else tuple(look.rounds for look in self.plan.looks)

    @property
    def margin(self) -> float:
        """Speeds within this share of each other are equivalent."""
        return MARGIN if self.plan is None else self.plan.margin
