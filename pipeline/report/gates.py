"""Gates: conditions on the report that decide the exit code.

A metric is a documented name for a place in report.json. Where a figure has an interval, the end that is nearest to
failure decides: a gate passes only when the evidence says so.

A gate on how much faster one stage is than another passes on nothing that the report itself does not claim. Where the
interval alone would let it pass, it takes more:
- a gate that equal speeds would fail (`>= 1.05`) asks for a difference: the verdict has to be `faster`, or `slower`;
- one that equal speeds would pass (`>= 0.95`) asks that nothing was lost: where that is nearer to 1 than the noise
  floor, the interval has to lie beyond the floor;
- a stage that changed nothing is as fast as the stage that it was made from, so that one's figures have to pass, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

from pipeline.report.figures import noise_floor_in_words
from pipeline.report.schema import GateResult, Kind, QualityFacts, Ratio, Report, Speed, StageReport
from pipeline.report.verdicts import is_contradicted, is_idle, noise_floor, why_undecided


class Bounds(NamedTuple):
    """A figure's interval; a figure without one is its own interval."""

    low: float
    high: float


Read = Callable[[StageReport, dict[str, str], Report], list[Bounds]]
"""From a stage, a selector of workload points, and the report that the stage is of."""

Over = Literal["vs_baseline", "vs_parent"]


class Metric(NamedTuple):
    description: str
    read: Read
    by_point: bool = False
    """Whether it has a value for every workload point, which a selector may narrow."""
    over: Over | None = None
    """What it is the speed over: then it is a ratio between two stages."""
    from_speed: bool = False
    """Whether it rests on measured speed, without having a value for every workload point."""
    kinds: tuple[Kind, ...] = ()
    """It is known only where one of these is timed; empty: whatever is timed."""
    paired: bool = False
    """Whether it compares with the baseline, which has no such figure itself."""
    share: bool = False
    """Whether it lies between 0 and 1."""
    unrun: bool = False
    """Whether it is known of a model that is made and never run."""


SELECTORS = ("batch", "prompt", "new_tokens")


def _points(stage: StageReport, kind: str, selector: dict[str, str]) -> Iterable[Speed]:
    for point in stage.speed or ():
        if point.kind == kind and all(str(getattr(point, k, None)) == v for k, v in selector.items()):
            yield point


def _speedup(kind: str, over: Over) -> Read:
    def read(stage: StageReport, selector: dict[str, str], report: Report) -> list[Bounds]:
        ratios = [getattr(p, over) for p in _points(stage, kind, selector)]
        return [Bounds(r.low, r.high) for r in ratios if r is not None]

    return read


def _rate(kind: str, field: str) -> Read:
    def read(stage: StageReport, selector: dict[str, str], report: Report) -> list[Bounds]:
        figures = [getattr(p, field) for p in _points(stage, kind, selector)]
        return [Bounds(f.low, f.high) for f in figures]

    return read


def _one(read: Callable[[StageReport], float | None]) -> Read:
    def bounds(stage: StageReport, selector: dict[str, str], report: Report) -> list[Bounds]:
        value = read(stage)
        return [] if value is None else [Bounds(value, value)]

    return bounds


def _over_baseline(read: Callable[[StageReport], float | None]) -> Read:
    """A figure without an interval, over the baseline's."""

    def bounds(stage: StageReport, selector: dict[str, str], report: Report) -> list[Bounds]:
        baseline = _find(report, report.baseline)
        mine, theirs = read(stage), read(baseline) if baseline is not None else None
        return [] if mine is None or not theirs else [Bounds(mine / theirs, mine / theirs)]

    return bounds


def _size(stage: StageReport) -> int | None:
    return stage.artifact.size_bytes if stage.artifact else None


def _weights(stage: StageReport) -> int | None:
    return stage.artifact.weights_bytes if stage.artifact else None


def _load(stage: StageReport) -> float | None:
    return stage.load.warm_s if stage.load else None


def _cold_load(stage: StageReport) -> float | None:
    return stage.load.cold_s if stage.load else None


def _memory(stage: StageReport) -> int | None:
    return stage.inference_peak_memory_bytes


def _nodes(stage: StageReport) -> int | None:
    return stage.effect.nodes[1] if stage.effect and stage.effect.nodes else None


def _slow_nodes(stage: StageReport) -> int | None:
    return sum(nodes.count for nodes in stage.effect.slow_nodes) if stage.effect and stage.effect.nodes else None


def _quantized(stage: StageReport) -> float | None:
    done, of = (stage.effect.weights_quantized if stage.effect else None) or (0, 0)
    return done / of if of else None


def _perplexity_ratio(stage: StageReport, selector: dict[str, str], report: Report) -> list[Bounds]:
    paired = stage.quality.vs_baseline if stage.quality else None
    if paired is None:
        return []
    ratio = paired.perplexity_ratio
    if ratio.low is None or ratio.high is None:  # the stage's predictions are not numbers: no bound holds
        return [Bounds(math.nan, math.nan)]
    return [Bounds(ratio.low, ratio.high)]


def _paired(field: str) -> Read:
    return _scored(lambda quality: getattr(quality.vs_baseline, field), needs_pair=True)


def _scored(read: Callable[[QualityFacts], float | None], *, needs_pair: bool = False) -> Read:
    """A figure of a scored stage. Null there means not finite, which no bound may let pass."""

    def bounds(stage: StageReport, selector: dict[str, str], report: Report) -> list[Bounds]:
        if stage.quality is None or (needs_pair and stage.quality.vs_baseline is None):
            return []
        value = read(stage.quality)
        return [Bounds(math.nan, math.nan) if value is None else Bounds(value, value)]

    return bounds


def _break_even(stage: StageReport, selector: dict[str, str], report: Report) -> list[Bounds]:
    """Never, where it was measured and is not faster, contradicts itself or is broken: no bound from above holds."""
    found = stage.break_even
    if found is not None:
        never = math.inf
        return [Bounds(*(never if tokens is None else float(tokens) for tokens in (found.low, found.high)))]
    points = [p for kind in ("decode", "forward") for p in stage.speed or () if p.kind == kind and p.vs_baseline]
    for point in points[:1]:
        slower = point.vs_baseline is not None and point.vs_baseline.verdict != "faster"
        if slower or is_contradicted(stage, point, report) or _is_broken(stage):
            return [Bounds(math.inf, math.inf)]
    return []


def _is_broken(stage: StageReport) -> bool:
    paired = stage.quality.vs_baseline if stage.quality else None
    return paired is not None and paired.verdict == "broken"


def _roofline(field: str) -> Read:
    return _one(lambda stage: getattr(stage.roofline, field) if stage.roofline else None)


def _ratio_metric(description: str, kind: Kind, over: Over = "vs_baseline") -> Metric:
    read = _speedup(kind, over)
    return Metric(description, read, by_point=True, over=over, kinds=(kind,), paired=over == "vs_baseline")


def _point_metric(description: str, kind: Kind, field: str) -> Metric:
    return Metric(description, _rate(kind, field), by_point=True, kinds=(kind,))


METRICS: dict[str, Metric] = {
    "decode_speedup": _ratio_metric("tokens/s of decode over the baseline's", "decode"),
    "prefill_speedup": _ratio_metric("tokens/s of prefill over the baseline's", "prefill"),
    "decode_speedup_over_parent": _ratio_metric(
        "tokens/s of decode over those of the stage that it was made from", "decode", "vs_parent"
    ),
    "prefill_speedup_over_parent": _ratio_metric(
        "tokens/s of prefill over those of the stage that it was made from", "prefill", "vs_parent"
    ),
    "forward_speedup": _ratio_metric("tokens/s of whole passes over the baseline's", "forward"),
    "forward_speedup_over_parent": _ratio_metric(
        "tokens/s of whole passes over those of the stage that it was made from", "forward", "vs_parent"
    ),
    "decode_tokens_per_s": _point_metric("decoded tokens a second", "decode", "tokens_per_s"),
    "prefill_tokens_per_s": _point_metric("prompt tokens a second", "prefill", "tokens_per_s"),
    "decode_latency_s": _point_metric("seconds for one token", "decode", "latency_s"),
    "prefill_latency_s": _point_metric("seconds for one prompt", "prefill", "latency_s"),
    "forward_tokens_per_s": _point_metric("tokens a second of whole passes", "forward", "tokens_per_s"),
    "forward_latency_s": _point_metric("seconds for one whole pass", "forward", "latency_s"),
    "mbu": Metric(
        "share of the host's bandwidth that decode used, at its first workload point",
        _roofline("mbu"),
        from_speed=True,
        kinds=("decode",),
    ),
    "mfu": Metric(
        "share of the host's arithmetic that the first prompt, or whole pass, used", _roofline("mfu"), from_speed=True
    ),
    "bytes_per_token": Metric(
        "read from memory for one decoded token, counted", _roofline("bytes_per_token"), kinds=("decode",)
    ),
    "break_even_tokens": Metric(
        "tokens after which its making is earned back; infinite where never",
        _break_even,
        from_speed=True,
        kinds=("decode", "forward"),
        paired=True,
    ),
    "perplexity": Metric("on the held-out text", _scored(lambda q: q.perplexity)),
    "perplexity_ratio": Metric("perplexity over the baseline's, paired", _perplexity_ratio, paired=True),
    "kl_divergence": Metric("KL(baseline || stage), nats per token", _paired("kl_divergence"), paired=True),
    "top1_agreement": Metric(
        "share of tokens with the same most likely next token", _paired("top1_agreement"), paired=True, share=True
    ),
    "max_abs_logit_error": Metric("largest difference of any logit", _paired("max_abs_logit_error"), paired=True),
    "size_bytes": Metric("bytes of the artifact", _one(_size), unrun=True),
    "size_ratio": Metric("bytes of the artifact over the baseline's", _over_baseline(_size), unrun=True),
    "weights_bytes": Metric("bytes of its weights", _one(_weights), unrun=True),
    "load_s": Metric("seconds to load, files in the page cache", _one(_load)),
    "load_ratio": Metric("load_s over the baseline's", _over_baseline(_load)),
    "cold_load_s": Metric("seconds to load, files not in the page cache", _one(_cold_load)),
    "peak_memory_bytes": Metric("of inference, anonymous + shared", _one(_memory)),
    "device_peak_memory_bytes": Metric("of the CUDA allocator", _one(lambda s: s.device_peak_memory_bytes)),
    "peak_memory_ratio": Metric("peak_memory_bytes over the baseline's", _over_baseline(_memory)),
    "nodes": Metric("nodes of the graph", _one(_nodes), unrun=True),
    "casts": Metric(
        "Cast nodes of the graph",
        _one(lambda s: s.effect.casts[1] if s.effect and s.effect.casts else None),
        unrun=True,
    ),
    "slow_nodes": Metric("nodes without a fast kernel at their settings", _one(_slow_nodes), unrun=True),
    "weights_quantized": Metric(
        "share of the parent's weights that the stage quantized", _one(_quantized), share=True, unrun=True
    ),
    "conversion_memory_bytes": Metric(
        "of the pass, anonymous + shared", _one(lambda s: s.cost.peak_memory_bytes), unrun=True
    ),
    "conversion_s": Metric("seconds that the pass took when it ran", _one(lambda s: s.cost.wall_s), unrun=True),
}
"""What a gate may name: STAGE.METRIC."""


class Condition(NamedTuple):
    """A gate, apart from the recipe that it stands in."""

    text: str
    stage: str
    metric: str
    selector: dict[str, str]
    comparison: str
    holds: Callable[[float], bool]


def evaluate_gate(gate: Condition, report: Report) -> GateResult:
    """passed, failed, or not_evaluated where the report lacks the evidence. All workload points must pass."""
    metric = METRICS[gate.metric]
    stage = _find(report, gate.stage)
    if stage is None:
        return GateResult(gate=gate.text, result="not_evaluated", reason=f"the stage {gate.stage} was not in this run")
    if (metric.by_point or metric.from_speed) and stage.status in {"failed", "skipped", "unmeasured"}:
        return GateResult(gate=gate.text, result="not_evaluated", reason=stage.reason or f"{stage.name} {stage.status}")
    bounds = metric.read(stage, gate.selector, report)
    if not bounds:
        reason = stage.reason or f"{gate.metric} was not measured"
        return GateResult(gate=gate.text, result="not_evaluated", reason=reason)
    observed = _observed(gate, bounds)
    shown = observed if math.isfinite(observed) else None
    if metric.over is not None and report.schedule is not None and not report.schedule.fits:
        reason = "the budget did not hold even the least number of rounds: nothing is claimed"
        return GateResult(gate=gate.text, result="not_evaluated", observed=shown, reason=reason)
    if not gate.holds(observed):
        return GateResult(gate=gate.text, result="failed", observed=shown)
    if metric.over is not None:
        kind = gate.metric.partition("_")[0]
        for point in _points(stage, kind, gate.selector):
            result, reason = _not_claimed(gate, stage, point, metric.over, report)
            if result is not None:
                return GateResult(gate=gate.text, result=result, observed=shown, reason=reason)
    return GateResult(gate=gate.text, result="passed", observed=shown)


def _observed(gate: Condition, bounds: list[Bounds]) -> float:
    """The end that is nearest to failure."""
    if gate.comparison.startswith(">"):
        return min(b.low for b in bounds)
    if gate.comparison.startswith("<"):
        return max(b.high for b in bounds)
    return next((v for b in bounds for v in b if not gate.holds(v)), bounds[0].low)


Refusal = tuple[Literal["failed", "not_evaluated"] | None, str]
"""What keeps a gate from passing whose interval holds, and why; None where nothing does."""


def _not_claimed(gate: Condition, stage: StageReport, point: Speed, over: Over, report: Report) -> Refusal:
    """Whether the report does not claim, at one workload point, what the gate asks for."""
    ratio: Ratio | None = getattr(point, over)
    if ratio is None:
        return None, ""
    floor = noise_floor(point, report)
    if floor is None:
        return "not_evaluated", "the noise floor is not known: nothing is claimed"
    if not gate.holds(1.0):
        if ratio.verdict == "inconclusive":
            why = (
                why_undecided(ratio, point, report)
                or "its own interval holds, that of all comparisons together does not"
            )
            return "failed", f"inconclusive: {why}"
    elif not _holds_beyond(gate, ratio, floor):
        return "failed", f"nearer to 1 than {noise_floor_in_words(floor)}: not shown"
    if is_idle(stage) and not _holds_of_parent(gate, stage, point, over, report):
        return "failed", f"it changed nothing, so that it is as fast as {stage.parent}: the difference is noise"
    return None, ""


def _holds_beyond(gate: Condition, ratio: Ratio, floor: float) -> bool:
    """Whether the bound lies outside the noise floor, or the interval beyond the floor's far end."""
    low, high = 1 / (1 + floor), 1 + floor
    if gate.comparison.startswith(">"):
        return gate.holds(low) or ratio.low >= high
    return gate.holds(high) or ratio.high <= low


def _holds_of_parent(gate: Condition, stage: StageReport, point: Speed, over: Over, report: Report) -> bool:
    """Whether the gate would pass with the figures of the stage that this one was made from."""
    if over == "vs_parent" or stage.parent == report.baseline:
        return gate.holds(1.0)
    parent = _find(report, str(stage.parent))
    theirs = next((p.vs_baseline for p in (parent.speed or ()) if p.point == point.point), None) if parent else None
    return theirs is not None and gate.holds(_observed(gate, [Bounds(theirs.low, theirs.high)]))


def _find(report: Report, name: str) -> StageReport | None:
    return next((stage for stage in report.stages if stage.name == name), None)
