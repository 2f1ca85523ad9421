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
    inside_floor: bool = Field(
        False, description="whether the interval reaches into the noise floor, where no claim is made"
    )
    rounds_to_decide: int | None = Field(
        None, description="inconclusive only: rounds in all that would decide, by the noise seen; null: no number would"
    )


class PlainRatio(Part):
    """A ratio with its 95 % interval, without a verdict. Null where it is not finite."""

    ratio: float | None
    low: float | None
    high: float | None


PointKey = tuple[Kind, int, int, int | None]
"""Kind, batch, prompt, new tokens: what tells one workload point from another."""


class NoiseFloor(Part):
    """The baseline against itself, in separate processes: no claim is made inside this interval."""

    kind: Kind
    batch: int
    prompt: int
    new_tokens: int | None = Field(None, description="decode only")
    ratio_low: float
    ratio_high: float

    @property
    def point(self) -> PointKey:
        return self.kind, self.batch, self.prompt, self.new_tokens


class Schedule(Part):
    """How the rounds were planned before the first of them, and what became of the plan."""

    budget_s: float
    margin: float = Field(description="speeds within this share of each other are equivalent")
    looks: tuple[int, ...] = Field(description="rounds after which it was looked whether all is decided; at most four")
    looks_taken: int
    rounds: int
    launches: int
    fits: bool = Field(
        True, description="false: the budget did not hold even the least number of rounds, and nothing is claimed"
    )
    ended: Literal["decided", "looks", "budget", "failed"] = Field(
        description="decided: every comparison had a verdict; looks: the last one was taken; budget: it was used up; "
        "failed: nothing was left to compare"
    )


class Speed(Part):
    """One workload point.

    prefill: one whole prompt; decode: one token, averaged over `new_tokens`; forward: a whole batch through a graph,
    whose `prompt` is the length of its sequences.
    """

    kind: Kind
    batch: int = Field(description="sequences at once")
    prompt: int = Field(description="tokens in a prompt")
    new_tokens: int | None = Field(None, description="tokens decoded after the prompt (decode only)")
    rounds: int
    launches: int = Field(description="times that the model's process was started anew")
    outliers: int = Field(0, description="blocks far from the median of their launch: flagged, and never removed")
    tokens_per_s: Interval
    latency_s: Interval = Field(
        description="seconds for one prompt (prefill), one token of every sequence (decode) or one pass (forward)"
    )
    vs_baseline: Ratio | None = None
    vs_parent: Ratio | None = None

    @property
    def point(self) -> PointKey:
        return self.kind, self.batch, self.prompt, self.new_tokens


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


class SlowNodes(Part):
    """Nodes of one operator for which the runtime has no fast kernel at their settings."""

    operator: str
    count: int
    reason: str


class RegionNode(Part):
    """A node of a graph, as one row of a drawing."""

    id: int = Field(description="the same before and after for a node that was kept")
    operator: str
    detail: str = Field("", description="its weights and attributes, in short")
    change: Literal["kept", "gone", "new", "rewired"] = "kept"
    inputs: tuple[int, ...] = Field((), description="ids of the shown nodes whose results it takes")


class Region(Part):
    """The changed nodes of one place of a graph, before and after, each list in the order of computation."""

    where: str = Field(description="the place that is shown, e.g. layer 0")
    alike: int = Field(1, description="places that changed alike, this one among them")
    before: tuple[RegionNode, ...]
    after: tuple[RegionNode, ...]
    left_out: int = Field(0, description="nodes of the place that are not shown, for there are too many")


GraphChange = Literal["none", "graph", "weights"]


class ComponentEffect(Part):
    """One of several components, against the parent's of the same name; against the only one where there is just one.

    Where the parent has several and the stage a single one, the parent's are listed, each against that.
    """

    name: str
    is_new: bool = Field(False, description="the parent has no component of that name")
    is_gone: bool = Field(False, description="the stage has no component of that name")
    kind: GraphChange | None = Field(None, description="what differs; null: there is nothing to compare it with")
    nodes: tuple[int | None, int | None] = Field(description="before, after; null: no such component")
    same_as: str | None = Field(
        None, description="the stage that it has graph and weights of, among those that this one was made from"
    )


class Effect(Part):
    """What the stage really changed, found by comparing its artifact with its parent's."""

    kind: Literal["none", "graph", "weights", "execution", "conversion"]
    nodes: tuple[int | None, int | None] | None = Field(None, description="before, after; null for torch")
    operators: dict[str, tuple[int, int]] = Field(default_factory=dict, description="those whose number changed")
    rules: dict[str, tuple[int, int]] = Field(default_factory=dict, description="rule -> done, of")
    weights_quantized: tuple[int, int] | None = Field(
        None, description="products newly quantized, of those by constant weights that could have been"
    )
    weights_changed: tuple[int, int] | None = Field(None, description="torch: tensors with other bytes, of all")
    casts: tuple[int, int] | None = Field(None, description="Cast nodes before, after; null for torch")
    slow_nodes: tuple[SlowNodes, ...] = Field((), description="of the stage's own graph, whoever made them")
    data_types: dict[str, tuple[int, int]] = Field(
        default_factory=dict, description="weights by data type, before and after, where the number changed"
    )
    modules: dict[str, tuple[int, int]] = Field(
        default_factory=dict, description="torch: modules by class, before and after, where the number changed"
    )
    parameters: tuple[int, int] | None = Field(None, description="numbers in weights of more than 256: before, after")
    region: Region | None = Field(None, description="the changed nodes of one layer; null: no graph, or none changed")
    components: tuple[ComponentEffect, ...] = Field((), description="where the stage or its parent has several")
    contradiction: str | None = Field(None, description="where the pass tells of more than was found, or of less")


class Target(Part):
    """What the recipe's hardware profile could reach: computed, never measured."""

    decode_tokens_per_s_limit: float | None = None
    prefill_tokens_per_s_limit: float | None = None
    bound_by: Literal["memory", "arithmetic"] | None = Field(
        None, description="what limits decode there, or a whole pass where nothing is decoded"
    )
    fits: bool | None = None


class Roofline(Part):
    """Bytes and operations counted from the artifact, against what the host can do. Computed, never measured."""

    bytes_per_token: int | None = Field(
        None,
        description="read from memory for one decoded token; sequences of a batch share the reading of the weights",
    )
    flops_per_token: int | None = Field(None, description="of one decoded token; a multiply-add counts two")
    prefill_flops_per_token: int | None = Field(None, description="of one token of a prompt, or of a whole pass")
    bandwidth_gb_per_s: float | None = Field(None, description="the host's, measured")
    gflops: float | None = Field(None, description="the host's in compute_dtype, measured")
    compute_dtype: str | None = Field(None, description="data type that most of the products compute in")
    mbu: float | None = Field(None, description="share of the host's bandwidth that decode used")
    mfu: float | None = Field(None, description="share of the host's arithmetic that prefill, or forward, used")
    flag: str | None = Field(None, description="where it is far below its siblings: what to look at")
    target: Target | None = None


class LayerError(Part):
    """How far a layer's output is from the reference's on the same tokens: null where it is not finite.

    A relative error is the norm of the difference over the norm of the reference's, by token, as the mean over tokens.
    """

    layer: str = Field(description="embedding, layer 0 …: the residual stream after it; head: the logits")
    relative_error: float | None
    added: float | None = Field(
        None, description="relative error where the layer is given what the reference's was: its own; null: not known"
    )
    attention: float | None = Field(None, description="relative error of what attention adds; null: not seen")
    mlp: float | None = Field(None, description="relative error of what the feed-forward part adds; null: not seen")


class Divergence(Part):
    """Where a stage's values leave the baseline's, layer by layer, for stages whose tensors can be matched."""

    reference: str = Field(description="the stage that it was compared with")
    component: str | None = Field(None, description="of several, the one farthest from the reference; null: the only")
    reference_component: str | None = Field(
        None, description="the reference's that it was compared with; null: the only"
    )
    tokens: int
    matched: tuple[int, int] | None = Field(None, description="layers that could be compared, of the reference's")
    layers: tuple[LayerError, ...]
    first: str | None = Field(description="the first layer whose output diverged; null: none")
    most: str | None = Field(description="the layer that added most")


class QualityRatio(Part):
    """Paired with the baseline on the same tokens."""

    perplexity_ratio: PlainRatio
    kl_divergence: float | None = Field(description="nats per token, KL(baseline || stage); null: not finite")
    top1_agreement: float | None
    max_abs_logit_error: float | None
    first_divergence: int | None = Field(description="first token of the sample text that differs; null: none")
    verdict: Quality
    reason: str | None = Field(None, description="the figure and the threshold that decided the verdict")


class QualityFacts(Part):
    perplexity: float | None
    tokens: int = Field(description="tokens scored")
    compared_tokens: int | None = Field(None, description="tokens whose whole distributions were compared")
    sample_prompt: str | None = None
    sample_text: str | None = Field(None, description="greedy continuation of the prompt")
    vs_baseline: QualityRatio | None = None
    divergence: Divergence | None = Field(None, description="where quality fell: the layers that it fell at")


class BreakEven(Part):
    """When the time that the optimization took is earned back, against running the baseline."""

    cost_s: float = Field(
        description="making this stage and all that it was made from, when made, beyond what the baseline needs"
    )
    tokens: int | None = Field(None, description="decoded (or forward) tokens that earn it back; null: never")
    low: int | None = Field(None, description="with the end of the interval that is best for the stage")
    high: int | None = Field(None, description="with the other; null: never")
    kind: Kind


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
    device_peak_memory_bytes: int | None = Field(None, description="of the CUDA allocator, where there is one")
    roofline: Roofline | None = None
    quality: QualityFacts | None = None
    break_even: BreakEven | None = Field(None, description="null: it is not faster than the baseline, or not known")


class PairedSpeed(Part):
    """Speed with over speed without, at one workload point."""

    kind: Kind
    batch: int
    prompt: int
    new_tokens: int | None = None
    ratio: Ratio

    @property
    def point(self) -> PointKey:
        return self.kind, self.batch, self.prompt, self.new_tokens


class Contrast(Part):
    """Speed of one stage over that of another, in the rounds that both ran in; 95 % interval, of this pair alone."""

    stage: str
    other: str
    kind: Kind
    batch: int
    prompt: int
    new_tokens: int | None = None
    ratio: float
    low: float
    high: float

    @property
    def point(self) -> PointKey:
        return self.kind, self.batch, self.prompt, self.new_tokens


class Contribution(Part):
    """What a pass contributed: the whole chain against the chain without it, from the same rounds."""

    stage: str = Field(description="the stage that was dropped")
    variant: str | None = Field(description="the stage that ends the chain without it; null: it cannot be dropped")
    reason: str | None = Field(None, description="why it cannot be dropped, or was not measured")
    same_artifact: bool = Field(
        False, description="the whole chain and the one without it end in one artifact: no difference is the pass's"
    )
    speed: tuple[PairedSpeed, ...] = ()
    perplexity_ratio: float | None = Field(None, description="of the whole chain over that without the pass")
    kl_divergence_change: float | None = None
    size_bytes_change: int | None = Field(None, description="negative: the pass made it smaller")


class Ablation(Part):
    """Each pass of the chain that ends in `stage`, dropped in turn."""

    stage: str
    contributions: tuple[Contribution, ...]
    extra_stages: tuple[str, ...] = Field((), description="stages of the report that were made for this alone")


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
    schedule: Schedule | None = Field(None, description="null: speed was not measured")
    noise_floor: tuple[NoiseFloor, ...] = ()
    stages: tuple[StageReport, ...]
    gates: tuple[GateResult, ...] = ()
    ablation: Ablation | None = None
    contrasts: tuple[Contrast, ...] = Field(
        (), description="every two stages but the baseline, at the first workload point of each kind"
    )
    pareto: tuple[str, ...] = Field(
        (), description="stages that no other was shown to beat: faster and not worse, or better and not slower"
    )
    export: str | None = Field(None, description="the stage whose model is in the run's model folder")

    def stage(self, name: str) -> StageReport:
        """Raises: KeyError where there is no such stage."""
        found = next((s for s in self.stages if s.name == name), None)
        if found is None:
            raise KeyError(name)
        return found

    def floor_at(self, point: Speed | PairedSpeed) -> NoiseFloor | None:
        """The noise floor at a workload point; None where it is not known."""
        for floor in self.noise_floor:
            if floor.point == point.point or floor.point == (*point.point[:3], None):
                return floor
        return None

    def to_json(self) -> str:
        return self.model_dump_json(indent=2, by_alias=True) + "\n"


def report_json_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of report.json."""
    schema = Report.model_json_schema(by_alias=True, mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
