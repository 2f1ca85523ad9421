"""report.json: the evaluation of all stages of one run. Everything that renders, gates or keeps history reads this.

`pipeline schema --report` prints it as JSON Schema. Null means not measured, never zero.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

REPORT_VERSION: Literal[1] = 1

Kind = Literal["prefill", "decode", "forward"]
Verdict = Literal["faster", "slower", "equivalent", "inconclusive"]
Quality = Literal["identical", "equivalent", "degraded", "broken"]


class Part(BaseModel):
    """A part of a report."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Interval(Part):
    """A figure with its 95 % interval."""

    median: float
    low: float
    high: float


class Ratio(Part):
    """Speed of this stage over that of another, from rounds that both ran in. Above 1 is faster."""

    ratio: float
    low: float
    high: float
    verdict: Verdict


class PlainRatio(Part):
    """A ratio with its 95 % interval, without a verdict. Null where it is not finite."""

    ratio: float | None
    low: float | None
    high: float | None


class NoiseFloor(Part):
    """The baseline against itself, in separate processes: no claim is made inside this interval."""

    kind: Kind
    batch: int
    prompt: int
    ratio_low: float
    ratio_high: float


class Speed(Part):
    """One workload point. prefill: one whole prompt; decode: one token, averaged over `new_tokens`."""

    kind: Kind
    batch: int = Field(description="sequences at once")
    prompt: int = Field(description="tokens in a prompt")
    new_tokens: int | None = Field(None, description="tokens decoded after the prompt (decode only)")
    rounds: int
    launches: int = Field(description="times that the model's process was started anew")
    tokens_per_s: Interval
    latency_s: Interval = Field(description="seconds for one prompt (prefill) or one token of every sequence (decode)")
    vs_baseline: Ratio | None = None
    vs_parent: Ratio | None = None


class Load(Part):
    """Seconds from a ready process to a loaded model, without the imports of its libraries."""

    cold_s: float | None = Field(None, description="after the files were dropped from the page cache")
    warm_s: float | None = Field(None, description="median of the later launches")
    saved_s: float | None = Field(None, description="the parent's warm load less this one's; negative: it takes longer")


class ArtifactFacts(Part):
    digest: str
    format: str
    size_bytes: int = Field(description="bytes that the artifact takes when written out alone")
    weights_bytes: int
    unique_bytes: int = Field(description="bytes in the store that none of the stages before it holds")


class Cost(Part):
    """What making the artifact took, when it was made. Memory is that of the process tree, sampled."""

    wall_s: float | None = None
    peak_memory_bytes: int | None = Field(None, description="anonymous + shared")
    peak_rss_bytes: int | None = Field(None, description="mapped files counted, too")


class PredictedMemory(Part):
    """Memory, anonymous + shared, as it was estimated before anything ran. The measured figures stand beside it."""

    conversion_bytes: int | None = Field(None, description="peak of making the artifact; null: nobody knows")
    inference_bytes: int | None = Field(None, description="peak of running it: weights, cache, activations and runtime")
    weights_bytes: int | None = Field(None, description="those that the process holds; those it maps are the next")
    mapped_bytes: int | None = Field(
        None, description="weights in their files' pages: not part of inference_bytes; they count in fits"
    )
    kv_cache_bytes: int | None = Field(None, description="at the workload's largest batch and length")
    activations_bytes: int | None = None
    runtime_bytes: int | None = Field(None, description="the process and its libraries")
    fits: bool | None = Field(None, description="whether inference fits into the target's memory; null: not known")


class Effect(Part):
    """What the stage really changed, found by comparing its artifact with its parent's."""

    kind: Literal["none", "graph", "weights", "execution", "conversion"]
    nodes: tuple[int | None, int | None] | None = Field(None, description="before, after; null for torch")
    operators: dict[str, tuple[int, int]] = Field(default_factory=dict, description="those whose number changed")
    rules: dict[str, tuple[int, int]] = Field(default_factory=dict, description="rule -> done, of")
    weights_quantized: tuple[int, int] | None = Field(None, description="done, of")
    weights_changed: tuple[int, int] | None = Field(None, description="torch: tensors with other bytes, of all")


class Target(Part):
    decode_tokens_per_s_limit: float | None = None
    fits: bool | None = None


class Roofline(Part):
    """Bytes and operations counted from the artifact, against what the host can do. Computed, never measured."""

    bytes_per_token: int | None = None
    flops_per_token: int | None = None
    mbu: float | None = None
    mfu: float | None = None
    flag: str | None = None
    target: Target | None = None


class QualityRatio(Part):
    """Paired with the baseline on the same tokens."""

    perplexity_ratio: PlainRatio
    kl_divergence: float | None = Field(description="nats per token, KL(baseline || stage); null: not finite")
    top1_agreement: float | None
    max_abs_logit_error: float | None
    first_divergence: int | None = Field(description="first token of the sample text that differs; null: none")
    verdict: Quality


class QualityFacts(Part):
    perplexity: float | None
    tokens: int = Field(description="tokens scored")
    compared_tokens: int | None = Field(None, description="tokens whose whole distributions were compared")
    sample_prompt: str | None = None
    sample_text: str | None = Field(None, description="greedy continuation of the prompt")
    vs_baseline: QualityRatio | None = None


class StageReport(Part):
    name: str
    pass_: str = Field(alias="pass")
    params: dict[str, Any]
    parent: str | None
    status: Literal["ran", "cached", "skipped", "failed", "unmeasured"]
    reason: str | None = None
    log: str | None = Field(None, description="relative to the report")
    artifact: ArtifactFacts | None = None
    cost: Cost = Cost()
    predicted_memory: PredictedMemory | None = None
    effect: Effect | None = None
    load: Load | None = None
    inference_peak_memory_bytes: int | None = Field(None, description="anonymous + shared, of the model's process")
    speed: tuple[Speed, ...] | None = Field(None, description="null: not measured in this run")
    roofline: Roofline | None = None
    quality: QualityFacts | None = None


class GateResult(Part):
    gate: str
    result: Literal["passed", "failed", "not_evaluated"]
    observed: float | None = Field(None, description="the interval's end that is nearest to failure")
    reason: str | None = None


class ModelFacts(Part):
    """Where the model came from."""

    source: str = Field(description="kind and name, e.g. builtin: llama2-tiny")
    random_weights: bool = Field(
        False, description="drawn from a seed: perplexity means nothing, agreement with the baseline does"
    )


class Cell(Part):
    """Which cell of the recipe's matrix this run was."""

    index: int
    of: int
    overrides: dict[str, Any]


class Lock(Part):
    """What the run depended on."""

    packages: dict[str, str]
    seed: int
    digests: dict[str, str] = Field(description="of the recipe, the evaluation text, and every stage's artifact")


class Report(Part):
    schema_version: Literal[1] = REPORT_VERSION
    recipe: str
    description: str = ""
    model: ModelFacts | None = None
    cell: Cell | None = Field(None, description="null: the recipe has no matrix")
    run: str = Field(description="the run's id")
    created: str = Field(description="UTC, ISO 8601")
    wall_s: float = Field(description="the whole run, up to writing this report")
    lock: Lock
    host: dict[str, Any]
    hardware: dict[str, Any] = Field(description="the target's profile")
    threads: int
    notes: tuple[str, ...] = Field((), description="what a reader should know before believing the figures")
    baseline: str
    noise_floor: tuple[NoiseFloor, ...] = ()
    stages: tuple[StageReport, ...]
    gates: tuple[GateResult, ...] = ()
    pareto: tuple[str, ...] = Field((), description="stages that none beats in both decode speed and perplexity")
    export: str | None = Field(None, description="the stage whose model is in the run's model folder")

    def stage(self, name: str) -> StageReport:
        """Raises: KeyError where there is no such stage."""
        found = next((s for s in self.stages if s.name == name), None)
        if found is None:
            raise KeyError(name)
        return found

    def to_json(self) -> str:
        return self.model_dump_json(indent=2, by_alias=True) + "\n"


def report_json_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of report.json."""
    schema = Report.model_json_schema(by_alias=True, mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
