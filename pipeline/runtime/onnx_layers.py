"""The layers of an ONNX graph of a causal language model, found by the graph's shape alone.

Fusing and quantizing change operators and names, but not the residual stream: the values that everything later depends
on. A node dominates another if every path from the tokens to that one goes through it; among the dominators of the
logits, those that add two values which both depend on the tokens are the places where a block joins the stream. Which
layer such a place belongs to is told by the key-value cache: it is the last whose past reaches it.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.artifact import ONNX_FILE, Artifact, FileEntry, Interface
from pipeline.errors import PipelineError
from pipeline.runtime.layer_outputs import EMBEDDING, HEAD, Place, Take
from pipeline.runtime.onnxruntime import OnnxRuntimeRunner
from pipeline.runtime.protocol import ExecutionSpec

if TYPE_CHECKING:
    import numpy as np

SUMS = {"Add": 0, "Sum": 0, "Gemm": 0, "SkipLayerNormalization": 3, "SkipSimplifiedLayerNormalization": 3}
"""Operators that can join a block to the stream, and which of their outputs is the sum."""

PASSED_THROUGH = frozenset({"Cast", "Identity", "Reshape"})
"""Between the stream and the sum that takes it."""

SIZES_ONLY = frozenset({"Shape", "Size"})
"""What depends on these alone does not depend on the values."""

TOKENS = -1
"""The tokens' place among the nodes: before the first."""


@dataclass(frozen=True)
class Joint:
    """A node at which a block joins the residual stream."""

    node: int
    stream: str | None
    """The value that the block was added to; None where it is not an input of the node."""
    added: str | None
    """What was added; None where the node does not tell it from the stream."""
    level: int | None
    """The last layer whose key-value cache reaches the node; None: none does."""


class OnnxLayers:
    """A session whose graph also gives out what lies between its layers.

    Raises: PipelineError where the graph has no residual stream, or does not load.
    """

    def __init__(self, artifact: Artifact, spec: ExecutionSpec) -> None:
        import onnx

        entry = artifact.component.files.get(ONNX_FILE)
        if entry is None:
            raise PipelineError(f"the artifact has no {ONNX_FILE}")
        model = onnx.load(artifact.locate(entry), load_external_data=False)
        config = artifact.read_json("config.json")
        self._places = watch_layers(model.graph, artifact.interface, config.get("num_hidden_layers"))
        data = model.SerializeToString()
        with tempfile.TemporaryDirectory(prefix="layers-") as folder:
            path = Path(folder) / ONNX_FILE
            path.write_bytes(data)
            self._runner = OnnxRuntimeRunner(_with_graph(artifact, path, data), spec)

    def run(self, tokens: np.ndarray, take: Take) -> None:
        """One pass over a sequence [S] from an empty cache; `take` is called in the order of the model."""
        names = list(self._places.values())
        for place, value in zip(self._places, self._runner.values(tokens[None], names), strict=True):
            if value.ndim == 3:  # [B, S, width]
                take(place, value[0])
            elif value.ndim == 2:  # a graph that folds batch and sequence into one
                take(place, value)


def _with_graph(artifact: Artifact, path: Path, data: bytes) -> Artifact:
    """The artifact with another graph over the same weights."""
    entry = FileEntry(digest=hashlib.sha256(data).hexdigest(), size_bytes=len(data), path=str(path))
    (name, component), *_ = artifact.manifest.components.items()
    component = component.model_copy(update={"files": {**component.files, ONNX_FILE: entry}})
    return Artifact(artifact.manifest.model_copy(update={"components": {name: component}}), artifact.blobs)


def watch_layers(graph: Any, interface: Interface, layers: int | None = None) -> dict[Place, str]:
    """Make what lies between the layers of an onnx.GraphProto outputs of it: place -> the value's name.

    `layers` is how many there are by the model's configuration, which a graph without a key-value cache needs.

    Raises: PipelineError where there is no residual stream, or no telling which layers its joints belong to.
    """
    joints = find_joints(graph, interface)
    if not joints:
        raise PipelineError("its graph has no residual stream that could be followed from the tokens to the logits")
    places: dict[Place, str] = {}
    first = joints[0]
    if first.stream is not None:
        places[Place(EMBEDDING)] = first.stream
    for index, own in _by_layer(joints, layers):
        if len(own) == 2 and own[0].added is not None and own[1].added is not None:
            places[Place.in_layer(index, "attention")] = own[0].added
            places[Place.in_layer(index, "mlp")] = own[1].added
        places[Place.in_layer(index)] = _sum_of(graph, own[-1].node)
    places[Place(HEAD)] = interface.outputs["logits"]
    known = {output.name for output in graph.output}
    for name in dict.fromkeys(places.values()):
        if name not in known:
            graph.output.add().name = name
    return places


def _by_layer(joints: Sequence[Joint], layers: int | None) -> Iterator[tuple[int, list[Joint]]]:
    """(index of a layer, its joints)."""
    if any(joint.level is not None for joint in joints):
        reached = [joint for joint in joints if joint.level is not None]
        for level, own in groupby(reached, key=lambda joint: joint.level):
            assert level is not None
            yield level, list(own)
        return
    each = len(joints) // layers if layers else 0
    if not layers or each not in (1, 2) or each * layers != len(joints):
        raise PipelineError(
            f"its graph has no key-value cache to tell its layers by, and {len(joints)} sums on the residual stream "
            f"for {layers or 'an unknown number of'} layers"
        )
    for index in range(layers):
        yield index, list(joints[index * each : (index + 1) * each])


def find_joints(graph: Any, interface: Interface) -> list[Joint]:
    """The nodes of an onnx.GraphProto at which a block joins the residual stream, in order."""
    nodes = list(graph.node)  # ONNX has each after those whose values it takes
    home = {interface.inputs["tokens"]: TOKENS}  # value that depends on the tokens -> the node that makes it
    dominator: dict[int, int] = {}
    level = {
        name: int(role[7:-1]) for role, name in interface.inputs.items() if re.fullmatch(r"past\.[kv]\[\d+\]", role)
    }
    for place, node in enumerate(nodes):
        if node.op_type in SIZES_ONLY:
            continue
        given = list(_values_taken(node))
        levels = [level[value] for value in given if value in level]
        before = {home[value] for value in given if value in home}
        if before:
            dominator[place] = _common_dominator(before, dominator)
        for value in node.output:
            if levels:
                level[value] = max(levels)
            if before:
                home[value] = place
    logits = interface.outputs.get("logits", "")
    found = []
    place = home.get(logits, TOKENS)
    while place != TOKENS:
        joint = _joint(nodes, place, home, dominator[place], level)
        if joint is not None:
            found.append(joint)
        place = dominator[place]
    return found[::-1]


def _common_dominator(places: set[int], dominator: dict[int, int]) -> int:
    """The last node that dominates all of these, or is one of them and dominates the rest."""
    first, *rest = places
    for other in rest:
        while first != other:
            if first > other:
                first = dominator[first]
            else:
                other = dominator[other]  # noqa: PLW2901 - both climb until they meet
    return first


def _joint(
    nodes: Sequence[Any], place: int, home: dict[str, int], dominator: int, level: dict[str, int]
) -> Joint | None:
    """The joint that a node on the stream is; None where it is none."""
    node = nodes[place]
    if node.op_type not in SUMS:
        return None
    terms = {"Gemm": (0, 2), "Sum": range(len(node.input))}.get(node.op_type, (0, 1))
    moving = [node.input[i] for i in terms if i < len(node.input) and node.input[i] in home]
    if len(set(moving)) < 2:
        return None
    streams = [value for value in moving if _is_stream(nodes, value, home, dominator)]
    added = [value for value in moving if value not in streams]
    levels = [level[value] for value in node.output if value in level]
    return Joint(
        node=place,
        stream=streams[0] if len(streams) == 1 else None,
        added=added[0] if len(streams) == 1 and len(added) == 1 and node.op_type != "Gemm" else None,
        level=max(levels) if levels else None,
    )


def _is_stream(nodes: Sequence[Any], value: str, home: dict[str, int], dominator: int) -> bool:
    """Whether it is what the dominating node put on the stream, or that in another data type or shape."""
    while home[value] != dominator:
        node = nodes[home[value]]
        if node.op_type not in PASSED_THROUGH or node.input[0] not in home:
            return False
        value = node.input[0]
    if dominator == TOKENS:
        return False
    node = nodes[dominator]
    which = SUMS.get(node.op_type, 0)
    return which < len(node.output) and node.output[which] == value


def _sum_of(graph: Any, place: int) -> str:
    """The value that leaves a joint; a fused norm is made to give it out."""
    node = graph.node[place]
    which = SUMS[node.op_type]
    while len(node.output) <= which:
        node.output.append("")
    if not node.output[which]:
        node.output[which] = f"{node.output[0]}.sum"
    name: str = node.output[which]
    return name


def _values_taken(node: Any) -> Iterator[str]:
    """Names of the values that a node takes, those that its subgraphs see outside among them."""
    yield from (name for name in node.input if name)
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            for inner in graph.node:
                yield from _values_taken(inner)
