"""What a stage changed, in words: found by comparing artifacts, and held against what its pass told of itself."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.report.figures import megabytes
from pipeline.report.schema import ComponentEffect, Effect, Report, StageReport
from pipeline.report.verdicts import is_idle

FEW_RULES = 3
"""So many rules are all told; of more those alone that did something, and the rest counted."""

MOST_RULES = 5
"""Rules that a sentence names."""


def change(stage: StageReport, report: Report) -> str:
    """What the stage changed, to be said of its name: `changed nothing: 0 of 155 nodes`."""
    if stage.parent is None:
        origin = f" ({report.model.source})" if report.model else ""
        return f"is the untouched model{origin}" + (", the baseline" if stage.name == report.baseline else "")
    effect = stage.effect
    if effect is None:
        return "changed what is not known"
    if is_idle(stage):
        return _nothing(effect) + _stored_otherwise(stage, report)
    nodes = _nodes(effect)
    aside = f" ({nodes})" if nodes else ""
    if is_put_together(effect):
        words = f"consists of {' and '.join(components_in_words(effect).rsplit(', ', 1))}{aside}"
    elif effect.kind == "conversion":
        words = f"converted the model to {stage.artifact.format if stage.artifact else 'another format'}{aside}"
    elif effect.kind == "execution":
        words = "changed how the model is executed, and nothing in it"
    elif effect.weights_quantized is not None:
        done, of = effect.weights_quantized
        words = f"quantized {done:,} of {of:,} weights{aside}"
    elif effect.kind == "weights":
        changed = effect.weights_changed
        words = (f"changed {changed[0]:,} of {changed[1]:,} tensors" if changed else "changed weights") + aside
    else:
        words = "changed the graph" + aside
    inserted = f", {casts}" if (casts := _casts(effect)) else ""
    rules = _rules(effect)
    return words + inserted + (f": {rules}" if rules else "")


def _rules(effect: Effect) -> str:
    """What each rule did; of many rules those that did something, most first, and how many others there are."""
    done = {rule: counts for rule, counts in effect.rules.items() if counts[0] or len(effect.rules) <= FEW_RULES}
    order = list(done.items())
    if len(effect.rules) > FEW_RULES:
        order.sort(key=lambda item: -item[1][0])
    told = [f"{rule} {count:,} of {of:,}" for rule, (count, of) in order[:MOST_RULES]]
    if len(order) > MOST_RULES:
        more = len(order) - MOST_RULES
        told.append(f"{more} more rule{'' if more == 1 else 's'}")
    if idle := len(effect.rules) - len(done):
        told.append(f"{idle} other rules did nothing" if told else f"{idle} rules did nothing")
    return ", ".join(told)


def effect_in_words(stage: StageReport) -> str:
    """What the stage changed, short enough for a table."""
    effect = stage.effect
    if effect is None:
        return "–"
    if is_idle(stage):
        return _nothing(effect)
    words: list[str] = [effect.kind]
    if is_put_together(effect):
        words.append(components_in_words(effect))
    elif effect.weights_quantized is not None:
        done, of = effect.weights_quantized
        words.append(f"{done:,} of {of:,} weights quantized")
    if nodes := _nodes(effect):
        words.append(nodes)
    if inserted := _casts(effect):
        words.append(inserted)
    return ", ".join(words)


def is_put_together(effect: Effect) -> bool:
    """Whether the stage has several components and its parent does not have them all."""
    own = [part for part in effect.components if not part.is_gone]
    return len(own) > 1 and any(part.is_new for part in own)


def components_in_words(effect: Effect) -> str:
    """The stage's components, each with the stage that it is the same as: `prefill as int8, decode as int4`."""
    own = [part for part in effect.components if not part.is_gone]
    return ", ".join(part.name + (f" as {part.same_as}" if part.same_as else "") for part in own)


def contradiction(stage: StageReport) -> str:
    """What the pass told of itself and the comparison did not find; empty where the two agree."""
    if stage.effect is None:
        return ""
    if stage.effect.contradiction:
        return stage.effect.contradiction
    told = {rule: done for rule, (done, _) in stage.effect.rules.items() if done}
    if not told or not is_idle(stage):
        return ""
    return f"its pass tells of {', '.join(f'{done:,} by {rule}' for rule, done in told.items())}, and nothing changed"


def slow_nodes_in_words(stage: StageReport) -> str:
    """Nodes without a fast kernel, with their reasons; empty where there is none."""
    slow = stage.effect.slow_nodes if stage.effect else ()
    return "; ".join(f"{s.count:,} {s.operator} without a fast kernel ({s.reason})" for s in slow)


def effect_facts(stage: StageReport) -> list[tuple[str, str]]:
    """Terms and their words, all that is known of what the stage changed, without its operators and modules."""
    effect = stage.effect
    if effect is None:
        return []
    facts: list[tuple[str, str]] = []
    if nodes := _nodes(effect).removesuffix(" nodes"):
        facts.append(("nodes", nodes))
    facts += [(f"component {part.name}", component_facts(part, str(stage.parent))) for part in effect.components]
    if effect.weights_quantized is not None:
        facts.append(("weights quantized", "{:,} of {:,}".format(*effect.weights_quantized)))
    if effect.weights_changed is not None:
        facts.append(("tensors changed", "{:,} of {:,}".format(*effect.weights_changed)))
    told = {rule: counts for rule, counts in effect.rules.items() if counts[0] or len(effect.rules) <= FEW_RULES}
    facts += [(f"rule {rule}", f"{done:,} of {of:,}") for rule, (done, of) in told.items()]
    if idle := [rule for rule in effect.rules if rule not in told]:
        facts.append((f"rules that did nothing: {len(idle):,}", ", ".join(idle)))
    if contrary := contradiction(stage):
        facts.append(("contradiction", contrary))
    if effect.casts is not None and any(effect.casts):
        facts.append(("Casts", _before_after(effect.casts)))
    if effect.parameters is not None:
        facts.append(("parameters", _before_after(effect.parameters)))
    facts += [(f"weights in {name}", _before_after(pair)) for name, pair in effect.data_types.items()]
    facts += [(f"slow: {s.count:,} {s.operator}", s.reason) for s in effect.slow_nodes]
    return facts


KIND_OF_COMPONENT = {
    "none": "graph and weights of {}",
    "graph": "another graph than {}",
    "weights": "other weights than {}",
}


def component_facts(part: ComponentEffect, other: str) -> str:
    """What a component is, and how it differs from the `other` stage: `206 nodes, other weights than int8`."""
    before, after = part.nodes
    own = before if part.is_gone else after
    told = [f"{own:,} nodes"] if own is not None else []
    if before is not None and after is not None and before != after and not part.is_gone:
        told = [f"{before:,} → {after:,} nodes"]
    if part.same_as:
        told.append(KIND_OF_COMPONENT["none"].format(part.same_as))
    if part.kind is not None and not (part.kind == "none" and part.same_as):
        told.append(KIND_OF_COMPONENT[part.kind].format(other))
    elif part.kind is None:
        told += ["gone"] if part.is_gone else []
    return ", ".join(told)


def changed_counts(stage: StageReport) -> list[tuple[str, Mapping[str, tuple[int, int]]]]:
    """(what is counted, the counts before and after of those whose number changed)."""
    if stage.effect is None:
        return []
    found = (("Operators", stage.effect.operators), ("Modules", stage.effect.modules))
    return [(title, counts) for title, counts in found if counts]


def most_changed(counts: Mapping[str, tuple[int, int]]) -> list[tuple[str, tuple[int, int]]]:
    """Operators or modules whose number changed, those that changed most first."""
    return sorted(counts.items(), key=lambda item: (-abs(item[1][1] - item[1][0]), item[0]))


def _nothing(effect: Effect) -> str:
    after = effect.nodes[1] if effect.nodes else None
    if after is not None:
        return f"changed nothing: 0 of {after:,} nodes"
    return "changed nothing" + (f": 0 of {effect.weights_changed[1]:,} tensors" if effect.weights_changed else "")


def _stored_otherwise(stage: StageReport, report: Report) -> str:
    """Where weights that no node reads came or went: the artifact has another size, and what runs is the same."""
    parent = next((s for s in report.stages if s.name == stage.parent), None)
    if stage.artifact is None or parent is None or parent.artifact is None:
        return ""
    before, after = parent.artifact.weights_bytes, stage.artifact.weights_bytes
    if before == after:
        return ""
    went = f"dropped {megabytes(before - after)}" if after < before else f"stores {megabytes(after - before)} more"
    return f", but {went} of weights that no node reads, or that are stored twice"


def _nodes(effect: Effect) -> str:
    before, after = effect.nodes or (None, None)
    if after is None:
        return ""
    if is_put_together(effect):  # the parent's are in each of them
        before = None
    return f"{after:,} nodes" if before in {None, after} else f"{before:,} → {after:,} nodes"


def _casts(effect: Effect) -> str:
    """Only what was inserted is told: a Cast more is what slows a graph down unnoticed."""
    if is_put_together(effect):
        return ""
    before, after = effect.casts or (0, 0)
    return f"{after - before:,} Cast{'' if after - before == 1 else 's'} inserted" if after > before else ""


def _before_after(pair: tuple[int, int]) -> str:
    before, after = pair
    return f"{after:,}" if before == after else f"{before:,} → {after:,}"
