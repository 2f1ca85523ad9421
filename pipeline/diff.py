"""What differs between two stages of a run: any two, not only a stage and what it was made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from pipeline.artifact import Artifact, Frozen, canonical_json
from pipeline.errors import PipelineError, RecipeError, did_you_mean
from pipeline.measure.effect import Origin, compare_artifacts, counterparts, graph_changes, graphs_of
from pipeline.measure.graph_changes import Alike, GraphChanges, region
from pipeline.measure.visible import all_visible, visible
from pipeline.measure.weight_contents import Contents, contents_of, places_of
from pipeline.report.folder import read_report
from pipeline.report.schema import Effect, Region, Report
from pipeline.store import Store

MOST_REGIONS = 8
"""Groups of alike places that are drawn; all are counted."""


class Group(Frozen):
    """Places of a graph that changed alike."""

    component: str
    places: tuple[str, ...] = Field(description="layers, or parts of the graph; '' is what belongs to no layer")
    gone: dict[str, int] = Field(description="nodes of one place by operator that the second stage does not have")
    new: dict[str, int] = Field(description="and those that the first one does not have")
    rewired: int = Field(description="nodes of one place that take other values")
    region: Region | None = Field(None, description="the first place, before and after; null: not drawn")


class Size(Frozen):
    size_bytes: tuple[int, int]
    weights_bytes: tuple[int, int]


class Diff(Frozen):
    """Everything that differs; pairs are of the first stage and the second."""

    run: str
    stages: tuple[str, str]
    formats: tuple[str, str]
    digests: tuple[str, str]
    size: Size
    effect: Effect = Field(description="as if the second had been made from the first")
    groups: tuple[Group, ...] = Field((), description="for graphs: the changed nodes, most alike places first")
    weights: tuple[int, int] | None = Field(
        None, description="graphs: tensors of the second stage whose bytes the first has nowhere, of all"
    )
    interface: dict[str, tuple[Any, Any]] = Field(default_factory=dict, description="what differs of it, by path")
    execution: dict[str, tuple[Any, Any]] = Field(default_factory=dict)
    configuration: dict[str, tuple[Any, Any]] = Field(default_factory=dict, description="config.json")
    transforms: tuple[tuple[dict[str, Any], ...], tuple[dict[str, Any], ...]] | None = None

    @property
    def equal(self) -> bool:
        """Whether nothing differs, but for names and where bytes lie."""
        other = self.interface or self.execution or self.configuration or self.other_weights_stored
        return self.effect.kind == "none" and not other

    @property
    def other_weights_stored(self) -> bool:
        """Whether one of them keeps weights that no node reads, or keeps some more often."""
        return self.effect.kind == "none" and self.size.weights_bytes[0] != self.size.weights_bytes[1]


def diff_stages(run: str, first: str, second: str, *, store: Store, runs: Path = Path("runs")) -> Diff:
    """Compare the artifacts of two stages of a run: a folder, or the name of a recipe, whose latest run is meant.

    Raises: RecipeError where there is no such run or stage, or an artifact is not in the store any more; PipelineError
    where the two cannot be compared.
    """
    report = read_report(run, runs)
    before, after = (_artifact(report, name, store) for name in (first, second))
    try:
        return _diff(report, (first, second), before, after)
    except Exception as error:  # a pass can yield anything, and what cannot be compared may run all the same
        why = str(error) if isinstance(error, PipelineError) else f"{type(error).__name__}: {error}"
        raise PipelineError(f"{first} and {second} cannot be compared: {visible(why)}") from error


def _diff(report: Report, stages: tuple[str, str], before: Artifact, after: Artifact) -> Diff:
    device = str(report.hardware.get("device", "cpu"))
    contents = contents_of(before, after)
    manifests = before.manifest, after.manifest
    interfaces = (manifests[0].interface.model_dump(mode="json"), manifests[1].interface.model_dump(mode="json"))
    same_transforms = manifests[0].transforms == manifests[1].transforms
    return Diff(
        run=f"{report.recipe}/{report.run}",
        stages=stages,
        formats=(before.format, after.format),
        digests=(before.digest, after.digest),
        size=Size(
            size_bytes=(manifests[0].size_bytes, manifests[1].size_bytes),
            weights_bytes=(manifests[0].weights_bytes, manifests[1].weights_bytes),
        ),
        effect=compare_artifacts(
            before, after, device=device, contents=contents, origins={"": Origin(stages[0], before)}
        ),
        groups=_groups(before, after, contents),
        weights=_other_weights(before, after, contents),
        interface=_differences(*interfaces),
        execution=_differences(manifests[0].execution, manifests[1].execution),
        configuration=_differences(before.read_json("config.json"), after.read_json("config.json")),
        transforms=None if same_transforms else all_visible((manifests[0].transforms, manifests[1].transforms)),
    )


def _artifact(report: Report, name: str, store: Store) -> Artifact:
    names = [stage.name for stage in report.stages]
    if name not in names:
        raise RecipeError(f"the run has no stage {name!r}", hint=did_you_mean(name, names, noun="stages"))
    stage = report.stage(name)
    if stage.artifact is None:
        why = f": {stage.reason}" if stage.reason else ""
        raise RecipeError(f"{name} has no artifact: in this run it {_became(stage.status)}{why}")
    found = store.examine(stage.artifact.digest)
    if not isinstance(found, Artifact):
        raise RecipeError(
            f"the artifact of {name} cannot be read from the store {store.root}: {found}",
            hint=f"run the recipe {report.recipe} again; a run keeps its artifacts for as long as its folder exists",
        )
    return found


def _became(status: str) -> str:
    return status if status in {"failed", "skipped"} else f"was {status}"


def _groups(before: Artifact, after: Artifact, contents: Contents) -> tuple[Group, ...]:
    if before.digest == after.digest:
        return ()
    graphs = graphs_of(before), graphs_of(after)
    if not all(graphs):
        return ()
    found = graph_changes(counterparts(*graphs), contents)
    groups = [(part, changes, group) for part, changes in found.items() for group in changes.groups]
    return tuple(_group(*found, drawn=number < MOST_REGIONS) for number, found in enumerate(groups))


def _group(component: str, changes: GraphChanges, group: Alike, *, drawn: bool) -> Group:
    return Group(
        component=component,
        places=group.places,
        gone=group.gone,
        new=group.new,
        rewired=group.rewired,
        region=region(changes, group) if drawn else None,
    )


def _other_weights(before: Artifact, after: Artifact, contents: Contents) -> tuple[int, int] | None:
    if before.format != "onnx" or after.format != "onnx":
        return None
    known = {contents.of[place] for place in places_of(before)}
    refs = [
        (part.files[ref.file].digest, ref.offset, ref.length)
        for part in after.manifest.components.values()
        for ref in part.tensors.values()
    ]
    return sum(1 for place in refs if contents.of[place] not in known), len(refs)


def _differences(first: Any, second: Any, path: str = "") -> dict[str, tuple[Any, Any]]:
    """The leaves that differ, by dotted path; None where one side has none. Control characters are made visible."""
    if isinstance(first, dict) and isinstance(second, dict):
        found: dict[str, tuple[Any, Any]] = {}
        for key in sorted(first.keys() | second.keys()):
            found |= _differences(first.get(key), second.get(key), f"{path}.{key}" if path else str(key))
        return found
    if canonical_json([first]) == canonical_json([second]):
        return {}
    return {visible(path): (all_visible(first), all_visible(second))}
