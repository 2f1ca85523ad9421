"""Gates: conditions on the report that decide the exit code.

A metric is a documented name for a place in report.json. Where a figure has an interval, the end that is nearest to
failure decides: a gate passes only when the evidence says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

from pipeline.report.schema import GateResult, QualityFacts, Report, Speed, StageReport


class Bounds(NamedTuple):
    """A figure's interval; a figure without one is its own interval."""

    low: float
    high: float


Read = Callable[[StageReport, dict[str, str], StageReport | None], list[Bounds]]
"""From a stage, a selector of workload points, and the baseline, where it is in the report."""


class Metric(NamedTuple):
    description: str
    read: Read
    by_point: bool = False
    """Whether it has a value for every workload point, which a selector may narrow."""


SELECTORS = ("batch", "prompt", "new_tokens")


def _points(stage: StageReport, kind: str, selector: dict[str, str]) -> Iterable[Speed]:
    for point in stage.speed or ():
        if point.kind == kind and all(str(getattr(point, k, None)) == v for k, v in selector.items()):
            yield point


def _speedup(kind: str, over: Literal["vs_baseline", "vs_parent"] = "vs_baseline") -> Read:
    def read(stage: StageReport, selector: dict[str, str], baseline: StageReport | None) -> list[Bounds]:
        ratios = [getattr(p, over) for p in _points(stage, kind, selector)]
        return [Bounds(r.low, r.high) for r in ratios if r is not None]

    return read


def _rate(kind: str, field: str) -> Read:
    def read(stage: StageReport, selector: dict[str, str], baseline: StageReport | None) -> list[Bounds]:
        figures = [getattr(p, field) for p in _points(stage, kind, selector)]
        return [Bounds(f.low, f.high) for f in figures]

    return read


def _one(read: Callable[[StageReport], float | None]) -> Read:
    def bounds(stage: StageReport, selector: dict[str, str], baseline: StageReport | None) -> list[Bounds]:
        value = read(stage)
        return [] if value is None else [Bounds(value, value)]

    return bounds


def _over_baseline(read: Callable[[StageReport], float | None]) -> Read:
    """A figure without an interval, over the baseline's."""

    def bounds(stage: StageReport, selector: dict[str, str], baseline: StageReport | None) -> list[Bounds]:
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


def _perplexity_ratio(stage: StageReport, selector: dict[str, str], baseline: StageReport | None) -> list[Bounds]:
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

    def bounds(stage: StageReport, selector: dict[str, str], baseline: StageReport | None) -> list[Bounds]:
        if stage.quality is None or (needs_pair and stage.quality.vs_baseline is None):
            return []
        value = read(stage.quality)
        return [Bounds(math.nan, math.nan) if value is None else Bounds(value, value)]

    return bounds


def _break_even(stage: StageReport, selector: dict[str, str], baseline: StageReport | None) -> list[Bounds]:
    """Never, where it was measured and is not faster: no bound from above holds."""
    found = stage.break_even
    if found is not None:
        never = math.inf
        return [Bounds(*(never if tokens is None else float(tokens) for tokens in (found.low, found.high)))]
    ratios = [point.vs_baseline for point in stage.speed or () if point.kind in ("decode", "forward")]
    if any(r is not None and r.verdict != "faster" for r in ratios[:1]):
        return [Bounds(math.inf, math.inf)]
    return []


def _roofline(field: str) -> Read:
    return _one(lambda stage: getattr(stage.roofline, field) if stage.roofline else None)


METRICS: dict[str, Metric] = {
    "decode_speedup": Metric("tokens/s of decode over the baseline's", _speedup("decode"), by_point=True),
    "prefill_speedup": Metric("tokens/s of prefill over the baseline's", _speedup("prefill"), by_point=True),
    "decode_speedup_over_parent": Metric(
        "tokens/s of decode over those of the stage that it was made from",
        _speedup("decode", "vs_parent"),
        by_point=True,
    ),
    "prefill_speedup_over_parent": Metric(
        "tokens/s of prefill over those of the stage that it was made from",
        _speedup("prefill", "vs_parent"),
        by_point=True,
    ),
    "forward_speedup": Metric("tokens/s of whole passes over the baseline's", _speedup("forward"), by_point=True),
    "forward_speedup_over_parent": Metric(
        "tokens/s of whole passes over those of the stage that it was made from",
        _speedup("forward", "vs_parent"),
        by_point=True,
    ),
    "decode_tokens_per_s": Metric("decoded tokens a second", _rate("decode", "tokens_per_s"), by_point=True),
    "prefill_tokens_per_s": Metric("prompt tokens a second", _rate("prefill", "tokens_per_s"), by_point=True),
    "decode_latency_s": Metric("seconds for one token", _rate("decode", "latency_s"), by_point=True),
    "prefill_latency_s": Metric("seconds for one prompt", _rate("prefill", "latency_s"), by_point=True),
    "forward_tokens_per_s": Metric("tokens a second of whole passes", _rate("forward", "tokens_per_s"), by_point=True),
    "forward_latency_s": Metric("seconds for one whole pass", _rate("forward", "latency_s"), by_point=True),
    "mbu": Metric("share of the host's bandwidth that decode used, at its first workload point", _roofline("mbu")),
    "mfu": Metric("share of the host's arithmetic that the first prompt, or whole pass, used", _roofline("mfu")),
    "bytes_per_token": Metric("read from memory for one decoded token, counted", _roofline("bytes_per_token")),
    "break_even_tokens": Metric("tokens after which its making is earned back; infinite where never", _break_even),
    "perplexity": Metric("on the held-out text", _scored(lambda q: q.perplexity)),
    "perplexity_ratio": Metric("perplexity over the baseline's, paired", _perplexity_ratio),
    "kl_divergence": Metric("KL(baseline || stage), nats per token", _paired("kl_divergence")),
    "top1_agreement": Metric("share of tokens with the same most likely next token", _paired("top1_agreement")),
    "max_abs_logit_error": Metric("largest difference of any logit", _paired("max_abs_logit_error")),
    "size_bytes": Metric("bytes of the artifact", _one(_size)),
    "size_ratio": Metric("bytes of the artifact over the baseline's", _over_baseline(_size)),
    "weights_bytes": Metric("bytes of its weights", _one(_weights)),
    "load_s": Metric("seconds to load, files in the page cache", _one(_load)),
    "load_ratio": Metric("load_s over the baseline's", _over_baseline(_load)),
    "cold_load_s": Metric("seconds to load, files not in the page cache", _one(_cold_load)),
    "peak_memory_bytes": Metric("of inference, anonymous + shared", _one(_memory)),
    "device_peak_memory_bytes": Metric("of the CUDA allocator", _one(lambda s: s.device_peak_memory_bytes)),
    "peak_memory_ratio": Metric("peak_memory_bytes over the baseline's", _over_baseline(_memory)),
    "nodes": Metric("nodes of the graph", _one(_nodes)),
    "casts": Metric(
        "Cast nodes of the graph", _one(lambda s: s.effect.casts[1] if s.effect and s.effect.casts else None)
    ),
    "slow_nodes": Metric("nodes without a fast kernel at their settings", _one(_slow_nodes)),
    "weights_quantized": Metric("share of the parent's weights that the stage quantized", _one(_quantized)),
    "conversion_memory_bytes": Metric("of the pass, anonymous + shared", _one(lambda s: s.cost.peak_memory_bytes)),
    "conversion_s": Metric("seconds that the pass took when it ran", _one(lambda s: s.cost.wall_s)),
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
    """passed, failed, or not_evaluated where the report lacks the figure. All workload points must pass."""
    try:
        stage = report.stage(gate.stage)
    except KeyError:
        return GateResult(gate=gate.text, result="not_evaluated", reason=f"the stage {gate.stage} was not in this run")
    baseline = next((s for s in report.stages if s.name == report.baseline), None)
    bounds = METRICS[gate.metric].read(stage, gate.selector, baseline)
    if not bounds:
        reason = stage.reason or f"{gate.metric} was not measured"
        return GateResult(gate=gate.text, result="not_evaluated", reason=reason)
    if gate.comparison.startswith(">"):
        observed = min(b.low for b in bounds)
    elif gate.comparison.startswith("<"):
        observed = max(b.high for b in bounds)
    else:
        observed = next((v for b in bounds for v in b if not gate.holds(v)), bounds[0].low)
    result: Literal["passed", "failed"] = "passed" if gate.holds(observed) else "failed"
    return GateResult(gate=gate.text, result=result, observed=observed if math.isfinite(observed) else None)
