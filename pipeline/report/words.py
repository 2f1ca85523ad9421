"""A report in words: a sentence for every stage and a headline for the run. Nothing is said that the figures do not
carry, and no number stands in them that is not in the report."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from pipeline.report.figures import (
    finer_interval,
    finer_times,
    floor_share,
    megabytes,
    number,
    percent,
    rate,
    rate_interval,
    seconds,
    times,
    times_interval,
)
from pipeline.report.schema import QualityRatio, Ratio, Report, Speed, StageReport

KINDS = ("decode", "prefill", "forward")
"""In the order in which they are told: what a user of a language model waits for comes first."""


def headline(report: Report) -> tuple[str, ...]:
    """What the run came to, the most urgent first, in a few short sentences."""
    fastest = [_fastest(report, kind) for kind in KINDS]
    told = [line for line in fastest if line]
    return tuple(filter(None, [_broken_line(report), *(told or [_unmeasured_line(report)]), _smallest(report),
                               _trouble(report)]))  # fmt: skip


def sentence(stage: StageReport, report: Report) -> str:
    """What the stage changed, and what that did to speed, quality, size and load, against baseline and parent."""
    if stage.status in {"failed", "skipped"}:
        word = "Failed" if stage.status == "failed" else "Skipped"
        return f"{word}: {stage.reason or 'no reason was recorded'}"
    clauses = [change(stage, report)]
    if stage.status == "unmeasured":
        clauses.append(f"not measured: {stage.reason or 'no reason was recorded'}")
    clauses += speed_clauses(stage, report)
    if not is_broken(stage) and (quality := quality_clause(stage, report)):
        clauses.append(quality)
    clauses += _resource_clauses(stage, report)
    shout = _broken_words(stage, report) + " " if is_broken(stage) else ""
    return shout + _ended(clauses)


def change(stage: StageReport, report: Report) -> str:
    """What the stage changed, found by comparing artifacts."""
    if stage.parent is None:
        origin = f" ({report.model.source})" if report.model else ""
        return f"The untouched model{origin}" + (", the baseline" if stage.name == report.baseline else "")
    effect = stage.effect
    if effect is None:
        return "What it changed is not known"
    before, after = effect.nodes or (None, None)
    if effect.kind == "none":
        if after is not None:
            return f"Changed nothing: 0 of {after:,} nodes"
        return "Changed nothing" + (f": 0 of {effect.weights_changed[1]:,} tensors" if effect.weights_changed else "")
    nodes = ""
    if after is not None:
        nodes = f"{after:,} nodes" if before in {None, after} else f"{before:,} → {after:,} nodes"
    aside = f" ({nodes})" if nodes else ""
    if effect.kind == "conversion":
        return f"Converted the model to {stage.artifact.format if stage.artifact else 'another format'}{aside}"
    if effect.kind == "execution":
        return "Changed how the model is executed, and nothing in it"
    if effect.weights_quantized is not None:
        done, of = effect.weights_quantized
        return f"Quantized {done:,} of {of:,} weights{aside}"
    if effect.kind == "weights":
        changed = effect.weights_changed
        return (f"Changed {changed[0]:,} of {changed[1]:,} tensors" if changed else "Changed weights") + aside
    rules = [f"{rule} {done:,} of {of:,}" for rule, (done, of) in effect.rules.items()]
    return "Changed the graph" + aside + (": " + ", ".join(rules) if rules else "")


def effect_in_words(stage: StageReport) -> str:
    """What the stage changed, short enough for a table."""
    effect = stage.effect
    if effect is None:
        return "–"
    if effect.kind == "none":
        return "changed nothing"
    words: list[str] = [effect.kind]
    if effect.weights_quantized is not None:
        done, of = effect.weights_quantized
        words.append(f"{done} of {of} weights quantized")
    before, after = effect.nodes or (None, None)
    if after is not None:
        words.append(f"{after} nodes" if before in {None, after} else f"{before} → {after} nodes")
    return ", ".join(words)


def speed_clauses(stage: StageReport, report: Report) -> list[str]:
    """One clause for each kind of work that was timed."""
    if stage.speed is None:
        return [] if stage.status == "unmeasured" else ["its speed was not measured in this run"]
    found = []
    for kind in KINDS:
        points = [p for p in stage.speed if p.kind == kind]
        if not points:
            continue
        if stage.name == report.baseline:
            found.append(_rates(kind, points))
        elif stage.effect is not None and stage.effect.kind == "none":
            found.append(_idle(kind, points, stage, report))
        else:
            found.append(_against(kind, points, stage, report))
    return found


def quality_clause(stage: StageReport, report: Report) -> str:
    quality = stage.quality
    if quality is None:
        return ""
    paired, random = quality.vs_baseline, has_random_weights(report)
    if paired is None:
        if random:
            return "its perplexity means nothing, for its weights are random"
        return f"perplexity {number(quality.perplexity, '.3f')}"
    if paired.verdict == "identical":
        return f"its predictions are identical to {report.baseline}'s"
    if random:
        return f"{_agreement(paired, report)}, {paired.verdict}; perplexity means nothing, for the weights are random"
    ratio = paired.perplexity_ratio
    interval = f" ({finer_interval(ratio.ratio, ratio)})" if ratio.ratio is not None else ""
    return f"perplexity {finer_times(ratio.ratio)} {report.baseline}'s{interval}, {paired.verdict}"


def noise_floor(point: Speed, report: Report) -> float | None:
    """The noise floor at a workload point, as a share."""
    floor = report.floor_at(point)
    return None if floor is None else floor_share(floor.ratio_low, floor.ratio_high)


def is_broken(stage: StageReport) -> bool:
    return bool(stage.quality and stage.quality.vs_baseline and stage.quality.vs_baseline.verdict == "broken")


def has_random_weights(report: Report) -> bool:
    return report.model is not None and report.model.random_weights


def point_in_words(point: Speed) -> str:
    """The work that was timed."""
    if point.kind == "decode":
        return f"decode of {point.new_tokens} tokens after {point.prompt}, batch {point.batch}"
    what = "prefill" if point.kind == "prefill" else "forward pass"
    return f"{what} of {point.prompt} tokens, batch {point.batch}"


def _rates(kind: str, points: Sequence[Speed]) -> str:
    first = points[0].tokens_per_s
    if len(points) == 1:
        return f"{kind} {rate(first.median)} tokens/s ({rate_interval(first.median, first)})"
    medians = [p.tokens_per_s.median for p in points]
    return f"{kind} {rate(min(medians))} to {rate(max(medians))} tokens/s at {len(points)} workload points"


class Span(NamedTuple):
    """From the lowest end of several intervals to the highest."""

    low: float
    high: float


def _against(kind: str, points: Sequence[Speed], stage: StageReport, report: Report) -> str:
    """Against the baseline, and the parent where that is another stage."""
    words = _compared(kind, [p.vs_baseline for p in points], report.baseline)
    if stage.parent not in {None, report.baseline}:
        further = [p.vs_parent for p in points]
        if any(further):
            words += ", and " + _compared("", further, str(stage.parent))
    return words


def _compared(kind: str, ratios: Sequence[Ratio | None], other: str) -> str:
    known = [r for r in ratios if r is not None]
    subject = f"{kind} " if kind else ""
    if not known:
        return f"{subject}was not compared with {other}"
    if len(known) == 1:
        ratio = known[0]
        figures = f"{times(ratio.ratio)} ({times_interval(ratio.ratio, ratio)})"
        return f"{subject}{'is ' if kind else ''}{_verdict_in_words(ratio.verdict, other)}, {figures}"
    low, high = min(known, key=lambda r: r.ratio), max(known, key=lambda r: r.ratio)
    verdicts = [r.verdict for r in known]
    if len(set(verdicts)) == 1:
        all_of_them = "both" if len(known) == 2 else f"all {len(known)}"
        said = f"{'is ' if kind else ''}{_verdict_in_words(verdicts[0], other)} at {all_of_them} workload points"
    else:
        counts = ", ".join(f"{verdicts.count(v)} {v}" for v in dict.fromkeys(verdicts))
        said = f"against {other} at {len(known)} workload points: {counts}"
    ends = Span(min(r.low for r in known), max(r.high for r in known))
    return f"{subject}{said}, {times(low.ratio)} to {times(high.ratio)} (within {times_interval(low.ratio, ends)})"


def _verdict_in_words(verdict: str, other: str) -> str:
    if verdict == "equivalent":
        return f"as fast as {other}"
    return f"inconclusive against {other}" if verdict == "inconclusive" else f"{verdict} than {other}"


def _idle(kind: str, points: Sequence[Speed], stage: StageReport, report: Report) -> str:
    """What was timed of a stage that changed nothing: noise, or something that the model does not explain."""
    pairs = []
    for point in points:
        ratio = point.vs_parent or (point.vs_baseline if stage.parent == report.baseline else None)
        if ratio is not None:
            pairs.append((ratio, noise_floor(point, report), point))
    if not pairs:
        return f"{kind} was not compared with {stage.parent}"
    floors = [
        floor for ratio, floor, _ in pairs if floor is not None and abs(math.log(ratio.ratio)) <= math.log1p(floor)
    ]
    if len(floors) == len(pairs):
        shifts = sorted(ratio.ratio for ratio, _, _ in pairs)
        if len(pairs) == 1:
            lies = f"lies inside the noise floor of {percent(floors[0])}"
            return f"{kind}'s {_shift(shifts[0])} against {stage.parent} {lies}"
        lies = f"lies inside their noise floors of {percent(min(floors))} to {percent(max(floors))}"
        shift = f"{_shift(shifts[0])} to {_shift(shifts[-1])}"
        return f"{kind}'s {shift} against {stage.parent} at {len(pairs)} workload points {lies}"
    said = []
    for ratio, floor, point in pairs:
        at = f" (batch {point.batch}, prompt {point.prompt})" if len(pairs) > 1 else ""
        shift = f"{kind}'s {_shift(ratio.ratio)} against {stage.parent}{at}"
        if floor is None:
            said.append(f"{shift} means nothing, for the noise floor is not known")
        elif ratio.verdict in {"faster", "slower"}:
            said.append(
                f"{shift} ({times_interval(ratio.ratio, ratio)}) lies beyond the noise floor of {percent(floor)}, "
                "and nothing in the model explains it"
            )
        else:
            said.append(f"{shift} ({times_interval(ratio.ratio, ratio)}) is {ratio.verdict}")
    return "; ".join(said)


def _shift(ratio: float) -> str:
    """A ratio as a change in percent, with its sign."""
    return f"{ratio - 1:+.1%}".replace("%", " %").replace("-", "−")


def _agreement(paired: QualityRatio, report: Report) -> str:
    same = percent(paired.top1_agreement) if paired.top1_agreement is not None else "no finite share"
    divergence = number(paired.kl_divergence, ".2g") if paired.kl_divergence is not None else "not finite"
    return f"the most likely token is {report.baseline}'s in {same} of places (KL {divergence})"


def _broken_words(stage: StageReport, report: Report) -> str:
    paired = stage.quality.vs_baseline if stage.quality else None
    ratio = paired.perplexity_ratio.ratio if paired else None
    if paired is None or (ratio is None and paired.top1_agreement is None):
        why = "they are not finite"
    elif has_random_weights(report) or ratio is None:
        why = _agreement(paired, report)
    else:
        why = f"perplexity {finer_times(ratio)} {report.baseline}'s"
    return f"BROKEN: its predictions are garbage, {why}, however fast it is."


def _resource_clauses(stage: StageReport, report: Report) -> list[str]:
    base = _find(report, report.baseline) if stage.name != report.baseline else None
    clauses = []
    if stage.artifact is not None:
        theirs = base.artifact.size_bytes if base and base.artifact else None
        clauses.append(_instead("takes", stage.artifact.size_bytes, theirs, megabytes))
    if stage.load and stage.load.warm_s is not None:
        loaded = base.load.warm_s if base and base.load else None
        clauses.append(_instead("loads in", stage.load.warm_s, loaded, seconds) + _load_saved(stage, report))
    if stage.inference_peak_memory_bytes is not None:
        used = base.inference_peak_memory_bytes if base else None
        clauses.append(_instead("runs in", stage.inference_peak_memory_bytes, used, megabytes))
    return clauses


def _load_saved(stage: StageReport, report: Report) -> str:
    saved = stage.load.saved_s if stage.load else None
    if saved is None or stage.parent in {None, report.baseline}:  # against the baseline it is said already
        return ""
    return f", {seconds(abs(saved))} {'less' if saved > 0 else 'more'} than {stage.parent}"


Figure = TypeVar("Figure", int, float)


def _instead(verb: str, mine: Figure, theirs: Figure | None, written: Callable[[Figure], str]) -> str:
    """What it is now and what it was; only the first where the two read the same."""
    before = None if theirs is None else written(theirs)
    now = written(mine)
    return f"{verb} {now}" if before in {None, now} else f"{verb} {now} instead of {before}"


def _fastest(report: Report, kind: str) -> str:
    """Who won at the first workload point of a kind, and who cannot be told from the winner; empty: not timed."""
    entered = []
    for stage in report.stages:
        point = next((p for p in stage.speed or () if p.kind == kind), None)
        if point is not None and point.vs_baseline is not None and not is_broken(stage):
            entered.append((point.vs_baseline, point, stage))
    if not entered:
        return ""
    several = len({(p.batch, p.prompt) for s in report.stages for p in s.speed or () if p.kind == kind}) > 1
    at = f" (batch {entered[0][1].batch}, prompt {entered[0][1].prompt})" if several else ""
    winners = sorted((e for e in entered if e[0].verdict == "faster"), key=lambda e: -e[0].ratio)
    if not winners:
        words = {"equivalent": "as fast as", "slower": "slower than", "inconclusive": "inconclusive against"}
        verdicts = {ratio.verdict for ratio, _, _ in entered}
        if len(entered) == 1 or len(verdicts) == 1:
            names = _listed([s.name for _, _, s in entered])
            be = "is" if len(entered) == 1 else "are"
            return f"No faster {kind}{at}: {names} {be} {words[entered[0][0].verdict]} {report.baseline}."
        return f"No stage was shown to be faster than {report.baseline} in {kind}{at}."
    ratio, point, best = winners[0]
    # one whose own verdict is inconclusive may be faster still
    others = sorted((e for e in entered if e[2].name != best.name), key=lambda e: -e[0].ratio)
    tied = [s.name for r, _, s in others if r.high >= ratio.low and not _decided(point, best, s)]
    line = f"Fastest {kind}{at}: {best.name}, {times(ratio.ratio)} {report.baseline} "
    line += f"({times_interval(ratio.ratio, ratio)})"
    if (cost := _price(best, report)) and kind == "decode":
        line += f", {cost}"
    if tied:
        line += f"; {_listed(tied)} cannot be told from it, for the intervals overlap"
    return line + "."


def _decided(point: Speed, best: StageReport, other: StageReport) -> bool:
    """Whether the two were compared directly and the winner was shown to be faster."""
    return best.parent == other.name and point.vs_parent is not None and point.vs_parent.verdict == "faster"


def _price(stage: StageReport, report: Report) -> str:
    """What the winner's speed costs in quality."""
    paired = stage.quality.vs_baseline if stage.quality else None
    if paired is None:
        return "its quality is not known"
    if paired.verdict == "identical":
        return "its predictions identical"
    if has_random_weights(report):
        return f"{_agreement(paired, report)}: {paired.verdict}"
    return f"at {finer_times(paired.perplexity_ratio.ratio)} its perplexity: {paired.verdict}"


def _smallest(report: Report) -> str:
    base = _find(report, report.baseline)
    if base is None or base.artifact is None:
        return ""
    whole = [s for s in report.stages if s.artifact is not None and not is_broken(s)]
    best = min(whole, key=lambda s: s.artifact.size_bytes if s.artifact else 0, default=base)
    if best.artifact is None or best.artifact.size_bytes >= base.artifact.size_bytes:
        return f"No model is smaller than {report.baseline}." if len(whole) > 1 else ""
    mine, theirs = megabytes(best.artifact.size_bytes), megabytes(base.artifact.size_bytes)
    return f"Smallest: {best.name}, {mine} instead of {theirs}." if mine != theirs else ""


def _broken_line(report: Report) -> str:
    broken = [s.name for s in report.stages if is_broken(s)]
    if not broken:
        return ""
    theirs, they = ("its", "it is") if len(broken) == 1 else ("their", "they are")
    return f"BROKEN: {_listed(broken)}; {theirs} predictions are garbage, however fast {they}."


def _trouble(report: Report) -> str:
    words = []
    for status in ("failed", "skipped", "unmeasured"):
        if names := [s.name for s in report.stages if s.status == status]:
            word = "Not measured" if status == "unmeasured" else status.capitalize()
            words.append(f"{word}: {_listed(names)}.")
    results = [g.result for g in report.gates]
    if results and set(results) == {"passed"}:
        words.append("All gates passed.")
    counts = [(results.count("failed"), "failed"), (results.count("not_evaluated"), "not evaluated")]
    if told := [f"{count} of {len(results)} {word}" for count, word in counts if count]:
        words.append(f"Gates: {', '.join(told)}.")
    return " ".join(words)


def _unmeasured_line(report: Report) -> str:
    return "Speed was not measured in this run." if all(s.speed is None for s in report.stages) else ""


def _find(report: Report, name: str) -> StageReport | None:
    return next((s for s in report.stages if s.name == name), None)


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def _ended(clauses: Sequence[str]) -> str:
    text = "; ".join(clauses).strip()
    text = text[:1].upper() + text[1:]
    return text if text.endswith((".", "!", "?")) else text + "."
