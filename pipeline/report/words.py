"""A report in words: a sentence for every stage and a headline for the run. Nothing is said that the figures do not
carry, and no number stands in them that is not in the report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from pipeline.report.effects import change, contradiction, slow_nodes_in_words
from pipeline.report.figures import (
    finer_interval,
    finer_times,
    megabytes,
    number,
    percent,
    seconds,
    times,
    times_interval,
)
from pipeline.report.points import KINDS, apart, is_faster, speed_at
from pipeline.report.schema import BreakEven, Divergence, QualityRatio, Ratio, Report, Speed, StageReport
from pipeline.report.speed_words import speed_clauses
from pipeline.report.verdicts import contradicts, is_contradicted, is_idle, margin_of, over_parent

WORTH_TELLING = 0.01
"""A model that is smaller by less is not told of as the smallest."""

MOST_NAMES = 3
"""Stages that a headline names; the rest is counted."""


def headline(report: Report) -> tuple[str, ...]:
    """What the run came to, the most urgent first, in a few short sentences."""
    fastest = [_fastest(report, kind) for kind in KINDS]
    told = [line for line in fastest if line]
    return tuple(
        filter(
            None,
            [
                _broken_line(report),
                *(told or [_unmeasured_line(report)]),
                *_contradictions(report),
                *_idle_contributions(report),
                *_flags(report),
                _smallest(report),
                _trouble(report),
            ],
        )
    )


def sentence(stage: StageReport, report: Report) -> str:
    """What the stage changed, and what that did to speed, quality, size and load, against baseline and parent."""
    if stage.status in {"failed", "skipped"}:
        word = "failed" if stage.status == "failed" else "was skipped"
        return f"{stage.name} {word}: {stage.reason or 'no reason was recorded'}"
    clauses = [f"{stage.name} {change(stage, report)}"]
    clauses += filter(None, [contradiction_in_words(stage), slow_nodes_in_words(stage)])
    if stage.status == "unmeasured":
        clauses.append(f"not measured: {stage.reason or 'no reason was recorded'}")
    clauses += speed_clauses(stage, report)
    if stage.roofline and stage.roofline.flag:
        clauses.append(f"look at it: {stage.roofline.flag}")
    if not is_broken(stage) and (quality := quality_clause(stage, report)):
        clauses.append(quality)
    if stage.quality and stage.quality.divergence and (fell := divergence_in_words(stage.quality.divergence)):
        clauses.append(fell)
    clauses += _resource_clauses(stage, report)
    if stage.break_even is not None and not is_broken(stage):
        clauses.append(break_even_in_words(stage.break_even))
    shout = _broken_words(stage, report) + " " if is_broken(stage) else ""
    return shout + _ended(clauses)


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
        return f"{_agreement(paired, report)}, {paired.verdict}"
    ratio = paired.perplexity_ratio
    interval = f" ({finer_interval(ratio.ratio, ratio)})" if ratio.ratio is not None else ""
    return f"perplexity {finer_times(ratio.ratio)} {report.baseline}'s{interval}, {paired.verdict}"


def divergence_in_words(divergence: Divergence) -> str:
    """Where the layers leave the reference's; empty where none does."""
    layers = {layer.layer: layer for layer in divergence.layers}
    first, most = divergence.first, divergence.most
    if first is None:
        return ""
    at = layers.get(first)
    error = f" ({_relative_error(at.relative_error)})" if at is not None else ""
    owner = "its values" if divergence.component is None else f"the values of its {divergence.component}"
    start = f"{owner} leave {reference_in_words(divergence)}'s first at {first}{error}"
    if most is None:
        return start
    finite = all(layer.relative_error is not None for layer in divergence.layers)
    known = finite and all(layer.added is not None for layer in divergence.layers)
    if most in layers and known:  # the errors of single layers decided, not the one that has come together there
        own = f"adds most, {layers[most].added:.2g} by itself"
        return f"{start}, which {own}" if most == first else f"{start}, and {most} {own}"
    if most == first:
        return f"{start}, which adds most, too"
    if most in layers and finite:
        return f"{start}, and the error grows most at {most} (to {layers[most].relative_error:.2g})"
    return f"{start}, and {most} adds most" + (" (not finite)" if most in layers else "")


def reference_in_words(divergence: Divergence) -> str:
    """The stage, and its component where it has several: `both/prefill`."""
    part = divergence.reference_component
    return divergence.reference if part is None else f"{divergence.reference}/{part}"


def _relative_error(error: float | None) -> str:
    return "not finite" if error is None else f"relative error {error:.2g}"


def earned_back(found: BreakEven | None) -> str:
    """The tokens after which a stage's cost is earned back, with their interval, for a table."""
    if found is None:
        return "–"
    if found.tokens is None:
        return "never"
    return f"{found.tokens:,} tokens" + _tokens_interval(found)


def break_even_in_words(found: BreakEven) -> str:
    """After how many tokens the time that making the model took is earned back."""
    tokens = "decoded tokens" if found.kind == "decode" else "tokens"
    cost = seconds(found.cost_s)
    if found.tokens is None:
        return f"the {cost} of making it are never earned back"
    return f"the {cost} of making it are earned back after {found.tokens:,} {tokens}{_tokens_interval(found)}"


def _tokens_interval(found: BreakEven) -> str:
    if found.low is None and found.high is None:
        return ""
    low, high = (f"{end:,}" if end is not None else "never" for end in (found.low, found.high))
    return f" ({low} to {high})" if "never" in {low, high} else f" ({low}–{high})"


def contradiction_in_words(stage: StageReport) -> str:
    said = contradiction(stage)
    return f"a contradiction: {said}" if said else ""


def is_broken(stage: StageReport) -> bool:
    return bool(stage.quality and stage.quality.vs_baseline and stage.quality.vs_baseline.verdict == "broken")


def reason_to_tell(paired: QualityRatio) -> str:
    """The figure and the threshold that decided a bad verdict; a good one needs no reason where room is short."""
    return paired.reason or "" if paired.verdict in {"degraded", "broken"} else ""


def is_extra(stage: StageReport, report: Report) -> bool:
    """Whether the stage was made for the ablation alone, and is no part of the recipe."""
    return report.ablation is not None and stage.name in report.ablation.extra_stages


def has_random_weights(report: Report) -> bool:
    return report.model is not None and report.model.random_weights


def short_flag(stage: StageReport) -> str:
    """What stands beside a flagged stage's verdict: `kernel not engaged`; empty where it is not flagged."""
    flag = stage.roofline.flag if stage.roofline else None
    if not flag:
        return ""
    first = flag.partition(":")[0]
    return first if len(first) <= 40 else "far below its siblings"


def front_kind(report: Report) -> str:
    """The work whose speed the Pareto front takes: the first of KINDS that was timed."""
    timed = {p.kind for s in report.stages for p in s.speed or ()}
    return next((kind for kind in KINDS if kind in timed), KINDS[0])


def _agreement(paired: QualityRatio, report: Report) -> str:
    same = percent(paired.top1_agreement) if paired.top1_agreement is not None else "no finite share"
    divergence = number(paired.kl_divergence, ".2g") if paired.kl_divergence is not None else "not finite"
    return f"the most likely token is {report.baseline}'s in {same} of places (KL {divergence})"


def _broken_words(stage: StageReport, report: Report) -> str:
    paired = stage.quality.vs_baseline if stage.quality else None
    ratio = paired.perplexity_ratio.ratio if paired else None
    if paired is None or (ratio is None and paired.top1_agreement is None):
        why = "they are not finite"
    elif paired.reason:
        why = paired.reason
    elif has_random_weights(report) or ratio is None:
        why = _agreement(paired, report)
    else:
        why = f"perplexity {finer_times(ratio)} {report.baseline}'s"
    return f"BROKEN: its predictions are garbage ({why}), however fast it is."


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
    if stage.device_peak_memory_bytes is not None:
        used = base.device_peak_memory_bytes if base else None
        clauses.append(_instead("takes on the device", stage.device_peak_memory_bytes, used, megabytes))
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


def _entered(report: Report, kind: str) -> list[tuple[Ratio, Speed, StageReport]]:
    """Who takes part at the first workload point of a kind.

    Not what is broken or was made for the ablation alone; for what changed nothing its parent stands, whose speed is
    its own.
    """
    point = next((p for s in report.stages for p in s.speed or () if p.kind == kind), None)
    found = []
    for stage in report.stages if point else ():
        own = speed_at(stage, point) if point else None
        if own is None or own.vs_baseline is None or is_broken(stage) or is_extra(stage, report):
            continue
        parent = _find(report, str(stage.parent))
        if is_idle(stage) and parent is not None and speed_at(parent, own) is not None:
            continue
        found.append((own.vs_baseline, own, stage))
    return found


def _fastest(report: Report, kind: str) -> str:
    """Who won at the first workload point of a kind, and who cannot be told from the winner; empty: not timed."""
    entered = _entered(report, kind)
    if not entered:
        return ""
    where = apart(entered[0][1], report)
    at = f" ({where})" if where else ""
    work = "forward pass" if kind == "forward" else kind
    winners = sorted((e for e in entered if e[0].verdict == "faster"), key=lambda e: -e[0].ratio)
    if not winners:
        words = {"equivalent": "as fast as", "slower": "slower than", "inconclusive": "inconclusive against"}
        verdicts = {ratio.verdict for ratio, _, _ in entered}
        if len(verdicts) == 1:
            names = _listed([s.name for _, _, s in entered])
            be = "is" if len(entered) == 1 else "are"
            return f"No faster {work}{at}: {names} {be} {words[entered[0][0].verdict]} {report.baseline}."
        return f"No stage was shown to be faster than {report.baseline} in {work}{at}."
    ratio, point, best = winners[0]
    # one whose own verdict is inconclusive may be faster still
    others = sorted((e for e in entered if e[2].name != best.name), key=lambda e: -e[0].ratio)
    tied = [s.name for _, _, s in others if not is_faster(best, s, point, report)]
    line = f"Fastest {work}{at}: {best.name}, {times(ratio.ratio)} {report.baseline} "
    line += f"({times_interval(ratio.ratio, ratio, margin_of(report))})"
    if kind == front_kind(report):
        line += f", {_price(best, report)}"
    if tied:
        line += f"; {_listed(tied)} cannot be told from it"
    return line + "."


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


def _contradictions(report: Report) -> list[str]:
    """Stages that changed nothing and were timed otherwise, or told that they did something."""
    own = _own_stages(report)
    timed = [s for s in own if any(is_contradicted(s, p, report) for p in s.speed or ())]
    told = [s for s in own if contradiction(s)]
    lines = []
    for stage in timed[:MOST_NAMES]:
        ratios = [over_parent(stage, p, report) for p in stage.speed or () if is_contradicted(stage, p, report)]
        verdicts = " and ".join(dict.fromkeys(r.verdict for r in ratios if r is not None))
        lines.append(
            f"Contradiction: {stage.name} changed nothing, and yet was timed {verdicts} than {stage.parent}; "
            "nothing in the model explains it."
        )
    if len(timed) > MOST_NAMES:
        more = len(timed) - MOST_NAMES
        which = (
            "1 more stage that changed nothing was" if more == 1 else f"{more} more stages that changed nothing were"
        )
        lines.append(f"Contradiction: {which} timed faster or slower, too.")
    lines += [f"Contradiction: {s.name}: {contradiction(s)}." for s in told[:MOST_NAMES]]
    if len(told) > MOST_NAMES:
        more = len(told) - MOST_NAMES
        lines.append(f"{more} more {'stage tells' if more == 1 else 'stages tell'} of other changes than were found.")
    return lines


def _idle_contributions(report: Report) -> list[str]:
    """Passes of an ablated chain without which the chain ends in the same artifact."""
    lines = []
    for found in report.ablation.contributions if report.ablation else ():
        if not found.same_artifact:
            continue
        timed = dict.fromkeys(point.ratio.verdict for point in found.speed if contradicts(found, point))
        chain = f"the chain that ends in {report.ablation.stage if report.ablation else ''} is the same artifact"
        if timed:
            lines.append(
                f"Contradiction: with and without {found.stage} {chain}, and yet with it was timed "
                f"{' and '.join(timed)}; the pass did not do that."
            )
        else:
            lines.append(f"{found.stage} contributed nothing: with and without it {chain}.")
    if len(lines) > MOST_NAMES:
        lines.sort(key=lambda line: not line.startswith("Contradiction"))
        lines = [*lines[:MOST_NAMES], f"Of {len(lines) - MOST_NAMES} more passes the same is to be said."]
    return lines


def _own_stages(report: Report) -> list[StageReport]:
    """The recipe's own stages: those that were made for an ablation alone are told of where it is told."""
    return [stage for stage in report.stages if not is_extra(stage, report)]


def _flags(report: Report) -> list[str]:
    flagged = [s for s in _own_stages(report) if s.roofline and s.roofline.flag]
    if len(flagged) > MOST_NAMES:
        return [f"Look at {_listed([s.name for s in flagged])}: far from what the host can do."]
    return [f"Look at {s.name}: {s.roofline.flag}." for s in flagged if s.roofline]


def _smallest(report: Report) -> str:
    base = _find(report, report.baseline)
    if base is None or base.artifact is None:
        return ""
    whole = [s for s in report.stages if s.artifact is not None and not is_broken(s) and not is_extra(s, report)]
    best = min(whole, key=lambda s: s.artifact.size_bytes if s.artifact else 0, default=base)
    if best.artifact is None or best.artifact.size_bytes > (1 - WORTH_TELLING) * base.artifact.size_bytes:
        return (
            f"No model is more than {100 * WORTH_TELLING:.0f} % smaller than {report.baseline}."
            if len(whole) > 1
            else ""
        )
    mine, theirs = megabytes(best.artifact.size_bytes), megabytes(base.artifact.size_bytes)
    return f"Smallest: {best.name}, {mine} instead of {theirs}."


def _broken_line(report: Report) -> str:
    broken = [s.name for s in _own_stages(report) if is_broken(s)]
    if not broken:
        return ""
    theirs, they = ("its", "it is") if len(broken) == 1 else ("their", "they are")
    return f"BROKEN: {_listed(broken, len(broken))}; {theirs} predictions are garbage, however fast {they}."


def _trouble(report: Report) -> str:
    words = []
    for status in ("failed", "skipped", "unmeasured"):
        if names := [s.name for s in _own_stages(report) if s.status == status]:
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


def _listed(names: Sequence[str], most: int = MOST_NAMES) -> str:
    """`a, b and c`; of more than `most` the first, and how many others there are."""
    if len(names) > most:
        return ", ".join(names[:most]) + f" and {len(names) - most} more"
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def _ended(clauses: Sequence[str]) -> str:
    text = "; ".join(clauses).strip()
    return text if text.endswith((".", "!", "?")) else text + "."


def layer_mark(name: str, found: Divergence) -> str:
    """`first` where the error begins, `adds most` where the layer itself adds most."""
    return " and ".join(word for word, at in (("first", found.first), ("adds most", found.most)) if at == name)
