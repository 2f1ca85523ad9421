"""What a stage really changed, found by comparing its artifact with its parent's, and what its pass told of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from pipeline.artifact import Artifact
from pipeline.errors import PipelineError
from pipeline.measure import torch_effect
from pipeline.measure.changed_weights import weights_changed
from pipeline.measure.fingerprint import Place, graph_fingerprint
from pipeline.measure.graph_changes import GraphChanges, changes_of, operator_of, region
from pipeline.measure.graph_weights import data_types, newly_quantized, nodes_in, parameters, restored
from pipeline.measure.slow_kernels import slow_nodes
from pipeline.measure.visible import visible
from pipeline.measure.weight_contents import Contents, contents_of
from pipeline.report.schema import ComponentEffect, Effect, GraphChange, Region

if TYPE_CHECKING:
    import onnx_ir as ir

EFFECT_VERSION = 9
"""Enters the key of cached effects: raised when the same artifacts would compare otherwise."""

__all__ = [
    "EFFECT_VERSION",
    "ComparisonError",
    "Effect",
    "Origin",
    "compare_artifacts",
    "graph_fingerprint",
    "with_rules",
]


class ComparisonError(PipelineError):
    """Two artifacts cannot be compared; that says nothing against the second."""


class Origin(NamedTuple):
    """A stage that another was made from."""

    stage: str
    artifact: Artifact


def compare_artifacts(
    before: Artifact,
    after: Artifact,
    *,
    device: str = "cpu",
    contents: Contents | None = None,
    origins: Mapping[str, Origin] | None = None,
) -> Effect:
    """What `after` changed with respect to its parent `before`; `device` is where it is to run.

    The kind is the most far-reaching that applies: conversion (another format), weights (other values or data types of
    weights, quantized products among them, whatever else changed), graph (other operators, attributes, edges or
    inputs, or other components; for torch another configuration or other module transforms), execution (only how a
    runner is to load it), none.

    Components are compared with those of the same name; where one of the two has a single component, all of the other's
    are compared with it (see `counterparts`). Of an artifact of several, each component is also held against the stages
    that it was made from: `origins`, by role.

    Graphs are loaded; the bytes of weights are read only where they lie in different places (see `contents_of`, whose
    result may be given). Raises: ComparisonError where `before` cannot be read, or the comparison failed; what reading
    `after` raises.
    """
    graphs_after = graphs_of(after)
    try:
        found = _compare(before, after, graphs_of(before), graphs_after, device=device, contents=contents)
        return _with_origins(found, after, graphs_after, origins or {})
    except Exception as error:  # a graph can be anything; one that cannot be compared may run all the same
        raise ComparisonError(visible(f"{type(error).__name__}: {error}")) from error


def _compare(
    before: Artifact,
    after: Artifact,
    graphs_before: Mapping[str, ir.Model],
    graphs_after: Mapping[str, ir.Model],
    *,
    device: str,
    contents: Contents | None,
) -> Effect:
    found = _facts(before, after, graphs_before, graphs_after)
    if graphs_after:
        found["slow_nodes"] = slow_nodes(graphs_after.values(), device)
    if before.format != after.format:
        operators = _changed(_operators(graphs_before), _operators(graphs_after))
        found["components"] = _components(graphs_before, graphs_after, {})
        return Effect(kind="conversion", operators=operators, **found)
    if before.digest == after.digest:
        same: dict[str, GraphChange] = dict.fromkeys(graphs_after, "none")
        return Effect(kind="none", components=_components(graphs_before, graphs_after, same), **found)
    if not graphs_after:
        return _compare_torch(before, after, found)
    contents = contents or contents_of(before, after)
    pairs = counterparts(graphs_before, graphs_after)
    changes = graph_changes(pairs, contents)
    kinds = {name: _kind(*pair, changes.get(name), contents) for name, pair in pairs.items()}
    same_parts = graphs_before.keys() == graphs_after.keys() or len(graphs_before) == 1 == len(graphs_after)
    kind = max(["none" if same_parts else "graph", *kinds.values()], key=FAR_REACHING.index)
    if kind == "none" and before.manifest.execution != after.manifest.execution:
        return Effect(kind="execution", components=_components(graphs_before, graphs_after, kinds), **found)
    return Effect(
        kind=kind,
        operators=_changed(_operators(graphs_before), _operators(graphs_after)),
        weights_quantized=newly_quantized(pairs.values()) if changes else None,
        region=_region(changes),
        components=_components(graphs_before, graphs_after, kinds),
        **found,
    )


FAR_REACHING: tuple[GraphChange, ...] = ("none", "graph", "weights")
"""From what changes least."""


def _kind(before: ir.Model, after: ir.Model, changes: GraphChanges | None, contents: Contents) -> GraphChange:
    """What differs between two graphs; `changes` are those of their structure, None where that is the same."""
    if changes is None:
        return "none" if _fingerprint(before, contents.of) == _fingerprint(after, contents.of) else "weights"
    quantized = newly_quantized([(before, after)]) is not None or restored(before, after)
    return "weights" if quantized or weights_changed(before, after, changes.match, contents) else "graph"


def counterparts(before: Mapping[str, ir.Model], after: Mapping[str, ir.Model]) -> dict[str, tuple[ir.Model, ir.Model]]:
    """Which graphs are to be compared, under the name of the component.

    Those of the same name; where one side has a single component, that with all of the other's.
    """
    if len(before) == 1:
        return {name: (old, new) for old in before.values() for name, new in after.items()}
    if len(after) == 1:
        return {name: (old, new) for new in after.values() for name, old in before.items()}
    return {name: (model, after[name]) for name, model in before.items() if name in after}


def graph_changes(pairs: Mapping[str, tuple[ir.Model, ir.Model]], contents: Contents) -> dict[str, GraphChanges]:
    """What differs in each pair of graphs that differ in more than their weights' values."""
    return {
        name: changes_of(before, after, contents.both)
        for name, (before, after) in pairs.items()
        if _fingerprint(before) != _fingerprint(after)
    }


def _components(
    before: Mapping[str, ir.Model], after: Mapping[str, ir.Model], kinds: Mapping[str, GraphChange]
) -> tuple[ComponentEffect, ...]:
    """Empty where neither has several."""
    if max(len(before), len(after)) < 2:
        return ()
    pairs = counterparts(before, after)
    found = []
    for name in after if len(before) == 1 else before if len(after) == 1 else dict.fromkeys([*after, *before]):
        old, new = pairs.get(name, (before.get(name), after.get(name)))
        found.append(
            ComponentEffect(
                name=name,
                is_new=name not in before,
                is_gone=name not in after,
                kind=kinds.get(name),
                nodes=(_nodes(old), _nodes(new)),
            )
        )
    return tuple(found)


def _nodes(model: ir.Model | None) -> int | None:
    return None if model is None else sum(1 for _ in nodes_in(model))


def _with_origins(
    effect: Effect, after: Artifact, graphs_after: Mapping[str, ir.Model], origins: Mapping[str, Origin]
) -> Effect:
    """The effect with the stage whose graph and weights each of several components has."""
    if len(graphs_after) < 2 or not origins:
        return effect
    known = [
        (role, origin.stage, graphs_of(origin.artifact), contents_of(origin.artifact, after).of)
        for role, origin in origins.items()
    ]

    def same_as(name: str) -> str | None:
        if name not in graphs_after:
            return None
        for _, stage, graphs, contents in sorted(known, key=lambda one: one[0] != name):
            wanted = _fingerprint(graphs_after[name], contents)
            for part in sorted(graphs, key=lambda part: part != name):
                if _fingerprint(graphs[part], contents) == wanted:
                    return stage if len(graphs) == 1 else f"{stage}/{part}"
        return None

    told = tuple(part.model_copy(update={"same_as": same_as(part.name)}) for part in effect.components)
    return effect.model_copy(update={"components": told})


def with_rules(effect: Effect, rules: Mapping[str, tuple[int, int]]) -> Effect:
    """The effect with what the pass told of its rules, and where the two contradict each other.

    What was told never changes the kind: a pass that tells of a hundred fusions in an unchanged graph did nothing.
    """
    told = [f"{visible(rule)} {done} of {of}" for rule, (done, of) in rules.items() if done]
    contradiction = None
    if told and effect.kind == "none":
        contradiction = f"the pass tells of {', '.join(told)}, and nothing was found changed"
    elif rules and not told and effect.kind in {"graph", "weights"}:
        what = "graph was" if effect.kind == "graph" else "weights were"
        contradiction = f"the pass tells that none of its rules did anything, and the {what} found changed"
    seen = {visible(rule): counts for rule, counts in rules.items()}
    return effect.model_copy(update={"rules": seen, "contradiction": contradiction})


def graphs_of(artifact: Artifact) -> dict[str, ir.Model]:
    """The graphs of its ONNX components."""
    from pipeline.onnx_model import load_onnx

    parts = artifact.manifest.components
    return {name: load_onnx(artifact, name) for name, part in parts.items() if part.format == "onnx"}


def _region(changes: Mapping[str, GraphChanges]) -> Region | None:
    """Of the component with most changed nodes alike."""
    groups = [(found, group) for found in changes.values() for group in found.groups]
    if not groups:
        return None
    found, group = max(groups, key=lambda g: (len(g[1].places), g[1].shown.count))
    return region(found, group)


def _facts(
    before: Artifact, after: Artifact, graphs_before: Mapping[str, ir.Model], graphs_after: Mapping[str, ir.Model]
) -> dict[str, object]:
    """What can be counted of any two artifacts."""
    sides = ((before, graphs_before), (after, graphs_after))
    types = [data_types(g.values()) if g else torch_effect.tensor_data_types(a) for a, g in sides]
    numbers = [parameters(g.values()) if g else torch_effect.tensor_parameters(a) for a, g in sides]
    found: dict[str, object] = {
        "nodes": (_count(graphs_before), _count(graphs_after)),
        "data_types": _changed(*types),
        "parameters": tuple(numbers),
    }
    if graphs_before and graphs_after:
        found["casts"] = (_operators(graphs_before)["Cast"], _operators(graphs_after)["Cast"])
    return found


def _compare_torch(before: Artifact, after: Artifact, found: Mapping[str, object]) -> Effect:
    """By the tensors, the configuration and the module transforms."""
    same_config = torch_effect.same_configuration(before, after)
    same_modules = same_config and before.manifest.transforms == after.manifest.transforms
    modules = {} if same_modules else torch_effect.changed_modules(before, after)
    changed = torch_effect.changed_tensors(before, after)
    facts = {**found, "weights_changed": changed, "modules": modules}
    if changed[0] or not torch_effect.same_tensor_names(before, after):
        return Effect(kind="weights", **facts)
    if not same_modules:
        return Effect(kind="graph", **facts)
    same_execution = before.manifest.execution == after.manifest.execution
    return Effect(kind="none" if same_execution else "execution", **facts)


def _count(graphs: Mapping[str, ir.Model]) -> int | None:
    return sum(1 for model in graphs.values() for _ in nodes_in(model)) if graphs else None


def _operators(graphs: Mapping[str, ir.Model]) -> Counter[str]:
    """Number of nodes by operator."""
    return Counter(operator_of(node) for model in graphs.values() for node in nodes_in(model))


def _changed(before: Counter[str], after: Counter[str]) -> dict[str, tuple[int, int]]:
    names = sorted(before.keys() | after.keys())
    return {name: (before[name], after[name]) for name in names if before[name] != after[name]}


def _fingerprint(model: ir.Model, known: Mapping[Place, Hashable] | None = None) -> str:
    """Of the structure, or with what is `known` of weights, of the contents, too."""
    return graph_fingerprint(model, contents=known is not None, known=known)
