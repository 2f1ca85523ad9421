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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.artifact import ONNX_FILE, Artifact, FileEntry, Interface
from pipeline.errors import PipelineError
from pipeline.runtime.layer_outputs import EMBEDDING, HEAD, Place, Stream, Take
from pipeline.runtime.onnxruntime import OnnxRuntimeRunner
from pipeline.runtime.phases import phases_of
from pipeline.runtime.protocol import ExecutionSpec

if TYPE_CHECKING:
    import numpy as np

SUMS = {"Add": 0, "Sum": 0, "Gemm": 0, "SkipLayerNormalization": 3, "SkipSimplifiedLayerNormalization": 3}
"""Operators that can join a block to the stream, and which of their outputs is the sum."""

PASSED_THROUGH = frozenset({"Cast", "Identity", "Reshape", "Slice", "Gather"})
"""Between the stream and the sum that takes it: a graph may go on with its last positions alone."""

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
    """A session whose graph also gives out what lies between its layers, or takes it in.

    Raises: PipelineError where the graph has no residual stream, does not load, or is one of two.
    """

    def __init__(self, artifact: Artifact, spec: ExecutionSpec, *, fed: bool = False) -> None:
        import onnx

        if phases_of(artifact) is not None:
            raise PipelineError(
                "it has a graph for prompts and another for single tokens; look at the stages that they come from"
            )
        entry = artifact.component.files.get(ONNX_FILE)
        if entry is None:
            raise PipelineError(f"the artifact has no {ONNX_FILE}")
        model = onnx.load(artifact.locate(entry), load_external_data=False)
        config = artifact.read_json("config.json")
        self._places = watch_layers(model.graph, artifact.interface, config.get("num_hidden_layers"))
        streams = {p: value for p, value in self._places.items() if p.part == "output" and p.layer != HEAD}
        self._fed = feed_layers(model.graph, streams) if fed else {}
        data = model.SerializeToString()
        with tempfile.TemporaryDirectory(prefix="layers-") as folder:
            path = Path(folder) / ONNX_FILE
            path.write_bytes(data)
            self._runner = OnnxRuntimeRunner(_with_graph(artifact, path, data, self._fed.values()), spec)

    def run(self, tokens: np.ndarray, take: Take, stream: Stream | None = None) -> None:
        """One pass over a sequence [S] from an empty cache; `take` is called in the order of the model."""
        names = list(self._places.values())
        given = {} if stream is None else {name: stream(place)[None] for place, name in self._fed.items()}
        for place, value in zip(self._places, self._runner.values(tokens[None], names, given), strict=True):
            if value.ndim == 3:  # [B, S, width]
                take(place, value[0])
            elif value.ndim == 2:  # a graph that folds batch and sequence into one
                take(place, value)


def _with_graph(artifact: Artifact, path: Path, data: bytes, inputs: Iterable[str]) -> Artifact:
    """The artifact with another graph over the same weights, which has these inputs, too."""
    entry = FileEntry(digest=hashlib.sha256(data).hexdigest(), size_bytes=len(data), path=str(path))
    (name, component), *_ = artifact.manifest.components.items()
    component = component.model_copy(update={"files": {**component.files, ONNX_FILE: entry}})
    roles = {**artifact.interface.inputs, **{f"stream.{given}": given for given in inputs}}
    interface = artifact.interface.model_copy(update={"inputs": roles})
    manifest = artifact.manifest.model_copy(update={"components": {name: component}, "interface": interface})
    return Artifact(manifest, artifact.blobs)


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


def feed_layers(graph: Any, streams: Mapping[Place, str]) -> dict[Place, str]:
    """Have all that takes a stream's value take an input of the graph instead: place -> the input's name, float32.

    A fused norm that also makes the sum is parted: the norm takes the input, and the sum stays what it was.
    """
    from onnx import TensorProto, helper

    names: dict[str, str] = {}  # of a stream's value -> what is taken instead
    for value in streams.values():
        names[value] = f"{value}.fed"
        given = helper.make_tensor_value_info(f"{value}.given", TensorProto.FLOAT, [None, None, None])
        graph.input.append(given)
    nodes = []
    for node in graph.node:
        _take_instead(node, names)
        nodes.append(node)
        for value in [name for name in node.output if name in names]:
            # in the data type of the value itself, whatever that is
            nodes.append(helper.make_node("CastLike", [f"{value}.given", value], [names[value]]))
            if (which := SUMS.get(node.op_type)) and node.output[which] == value and node.output[0]:
                nodes.append(_norm_alone(node, names[value]))
    copies = [type(node).FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)
    return {place: f"{value}.given" for place, value in streams.items()}


def _take_instead(node: Any, names: Mapping[str, str]) -> None:
    for place, name in enumerate(node.input):
        if name in names:
            node.input[place] = names[name]
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            for inner in graph.node:
                _take_instead(inner, names)


def _norm_alone(node: Any, stream: str) -> Any:
    """The norm of a node that adds and normalizes, over `stream`; the node's own norm gets another name."""
    from onnx import helper

    simplified = node.op_type == "SkipSimplifiedLayerNormalization"
    given = [stream, node.input[2]]
    if not simplified and len(node.input) > 3 and node.input[3]:
        given.append(node.input[3])  # beta
    settings = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    kind = "SimplifiedLayerNormalization" if simplified else "LayerNormalization"
    norm = helper.make_node(kind, given, [node.output[0]], axis=-1, epsilon=settings.get("epsilon", 1e-12))
    node.output[0] = f"{node.output[0]}.unused"
    return norm


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
        for value in filter(None, node.output):  # one that is left out has no name
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
