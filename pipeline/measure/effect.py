"""What a stage really changed, found by comparing its artifact with its parent's.

A graph's fingerprint is built from the inputs up: the hash of a value is that of its node's operator, attributes and
input values, so names play no part. The hash of the graph is over the multiset of its nodes' hashes and its outputs
in order. Weights enter either as data type and shape (the structure) or with their contents, too.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from pipeline.artifact import Artifact, Frozen, TensorRef, canonical_json

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

EFFECT_VERSION = 3
"""Enters the key of cached effects: raised when the same two artifacts would compare otherwise."""

EffectKind = Literal["none", "graph", "weights", "execution", "conversion"]

QUANTIZED_PRODUCTS = frozenset(
    {
        ("com.microsoft", "MatMulNBits"),
        ("com.microsoft", "DynamicQuantizeMatMul"),
        ("com.microsoft", "MatMulIntegerToFloat"),
        ("com.microsoft", "MatMulBnb4"),
        ("com.microsoft", "QMoE"),
        ("", "MatMulInteger"),
        ("", "QLinearMatMul"),
    }
)
"""Operators that multiply by quantized weights."""

PRODUCTS = frozenset({("", "MatMul"), ("", "Gemm")})
PASSED_THROUGH = frozenset({"Transpose", "Cast", "Identity", "Reshape"})
"""Between a constant weight and the product that takes it."""

Place = tuple[str, int, int]
"""(digest of a file, offset, length): equal places hold equal bytes."""


class Effect(Frozen):
    """The difference between an artifact and its parent.

    `kind` is the most far-reaching that applies: conversion (another format), weights (other values or data types of
    weights, quantized products among them), graph (other operators, attributes, edges or inputs; for torch another
    configuration or other module transforms), execution (only how a runner is to load it), none.
    """

    kind: EffectKind
    nodes: tuple[int | None, int | None] = Field(default=(None, None), description="[before, after]; None for torch")
    operators: dict[str, tuple[int, int]] = Field(
        default_factory=dict, description="only those whose number changed: operator -> [before, after]"
    )
    weights_quantized: tuple[int, int] | None = Field(
        default=None, description="[newly quantized, products by a constant weight that were not quantized before]"
    )
    weights_changed: tuple[int, int] | None = Field(
        default=None,
        description="torch only: [tensors that are not in the parent with that name and these bytes, of all]",
    )


def compare_artifacts(before: Artifact, after: Artifact) -> Effect:
    """What `after` changed with respect to its parent `before`.

    Graphs are loaded; the bytes of weights are read only where the structures are equal and the weights lie in
    different places.
    """
    graphs_before, graphs_after = _graphs(before), _graphs(after)
    nodes = (_count(graphs_before), _count(graphs_after))
    if before.format != after.format:
        return Effect(kind="conversion", nodes=nodes)
    same_execution = before.manifest.execution == after.manifest.execution
    idle: EffectKind = "none" if same_execution else "execution"
    if before.digest == after.digest:
        return Effect(kind="none", nodes=nodes)
    if not graphs_after:
        return _compare_torch(before, after, idle)
    operators = _changed(_operators(graphs_before), _operators(graphs_after))
    quantized = _newly_quantized(graphs_before.values(), graphs_after.values())
    if quantized is not None:
        return Effect(kind="weights", nodes=nodes, operators=operators, weights_quantized=quantized)
    if _fingerprints(graphs_before) != _fingerprints(graphs_after):
        return Effect(kind="graph", nodes=nodes, operators=operators)
    known = _places(before) & _places(after)
    if _fingerprints(graphs_before, known) != _fingerprints(graphs_after, known):
        return Effect(kind="weights", nodes=nodes)
    return Effect(kind=idle, nodes=nodes)


def graph_fingerprint(model: ir.Model, *, contents: bool = True, known: Collection[Place] = ()) -> str:
    """SHA-256 of a graph without regard to names.

    With `contents` False, weights that lie outside the graph count by data type and shape only. Those in `known`
    places count by their place, and are not read.
    """
    hashed = _GraphHash(contents=contents, known=known)
    functions = sorted((*map(str, key), hashed.graph(function.graph, {})) for key, function in model.functions.items())
    opsets = sorted((str(domain), version) for domain, version in model.opset_imports.items())
    return _hash(hashed.graph(model.graph, {}), functions, opsets).hex()


class _GraphHash:
    def __init__(self, *, contents: bool, known: Collection[Place]) -> None:
        self._contents = contents
        self._known = known

    def graph(self, graph: ir.Graph, outer: dict[ir.Value, bytes]) -> bytes:
        """Hash of a graph; `outer` are the hashes of the values that a subgraph can see."""
        values = dict(outer)
        for place, value in enumerate(graph.inputs):
            shape = value.shape
            sizes = None if shape is None else [size if isinstance(size, int) else "any" for size in shape]
            values[value] = _hash("input", place, str(value.dtype), sizes)
        for value in graph.initializers.values():
            if value not in values:
                values[value] = self._initializer(value)
        nodes = []
        for node in _in_order(graph):
            own = _hash(
                "node",
                node.domain,
                node.op_type,
                sorted((name, self._attribute(attribute, values)) for name, attribute in node.attributes.items()),
                [values.get(value, b"unknown") if value is not None else b"" for value in node.inputs],
            )
            nodes.append(own)
            for place, value in enumerate(node.outputs):
                values[value] = _hash("output", own, place)
        return _hash("graph", sorted(nodes), [values.get(value, b"unknown") for value in graph.outputs])

    def _initializer(self, value: ir.Value) -> bytes:
        from pipeline.stored_tensor import StoredTensor

        tensor = value.const_value
        if tensor is None:
            return _hash("initializer without a value")
        kind = ("initializer", tensor.dtype.name, [str(size) for size in tensor.shape])
        if not isinstance(tensor, StoredTensor):
            return _hash(*kind, hashlib.sha256(tensor.tobytes()).digest())
        if not self._contents:
            return _hash(*kind)
        place = (tensor.entry.digest, tensor.ref.offset, tensor.ref.length) if tensor.entry else None
        if place in self._known:
            return _hash(*kind, place)
        return _hash(*kind, hashlib.sha256(_bytes(tensor.numpy()).data).digest())

    def _attribute(self, attribute: ir.Attr, values: dict[ir.Value, bytes]) -> Any:
        import onnx_ir as ir

        kind = attribute.type
        if kind == ir.AttributeType.GRAPH:
            return self.graph(attribute.as_graph(), values)
        if kind == ir.AttributeType.GRAPHS:
            return [self.graph(graph, values) for graph in attribute.as_graphs()]
        if kind == ir.AttributeType.TENSOR:
            tensor = attribute.as_tensor()
            return tensor.dtype.name, [str(size) for size in tensor.shape], tensor.tobytes()
        return kind.name, repr(attribute.value)


def _hash(*parts: Any) -> bytes:
    return hashlib.sha256(repr(parts).encode()).digest()


def _in_order(graph: ir.Graph) -> Iterator[ir.Node]:
    """Nodes after those whose values they take. ONNX asks for this order; a graph in memory need not have it."""
    known = {value for node in graph for value in node.outputs}
    done: set[ir.Value] = set()
    waiting = list(graph)
    while waiting:
        late = []
        for node in waiting:
            if all(value is None or value not in known or value in done for value in node.inputs):
                done.update(node.outputs)
                yield node
            else:
                late.append(node)
        if len(late) == len(waiting):  # a circle: no valid graph, but still one that can be compared
            yield from late
            return
        waiting = late


def _graphs(artifact: Artifact) -> dict[str, ir.Model]:
    from pipeline.onnx_model import load_onnx

    parts = artifact.manifest.components
    return {name: load_onnx(artifact, name) for name, part in parts.items() if part.format == "onnx"}


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    for graph in model.graphs():
        yield from graph


def _count(graphs: dict[str, ir.Model]) -> int | None:
    return sum(1 for model in graphs.values() for _ in _nodes(model)) if graphs else None


def _operators(graphs: dict[str, ir.Model]) -> Counter[str]:
    """Number of nodes by operator; those of another domain than ONNX's own with it: com.microsoft.MatMulNBits."""
    return Counter(
        f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        for model in graphs.values()
        for node in _nodes(model)
    )


def _changed(before: Counter[str], after: Counter[str]) -> dict[str, tuple[int, int]]:
    names = sorted(before.keys() | after.keys())
    return {name: (before[name], after[name]) for name in names if before[name] != after[name]}


def _fingerprints(graphs: dict[str, ir.Model], known: Collection[Place] | None = None) -> dict[str, str]:
    """By component: of the structure, or with `known` places, of the contents, too."""
    contents = known is not None
    return {name: graph_fingerprint(m, contents=contents, known=known or ()) for name, m in graphs.items()}


def _places(artifact: Artifact) -> set[Place]:
    parts = artifact.manifest.components.items()
    return {_place(artifact, name, ref) for name, part in parts for ref in part.tensors.values()}


def _newly_quantized(before: Collection[ir.Model], after: Collection[ir.Model]) -> tuple[int, int] | None:
    """(products quantized in `after` beyond those of `before`, products by constant weights in `before`)."""
    done = _count_where(after, _is_quantized) - _count_where(before, _is_quantized)
    return (done, _count_where(before, _has_constant_weight)) if done > 0 else None


def _count_where(models: Collection[ir.Model], test: Callable[[ir.Node], bool]) -> int:
    return sum(1 for model in models for node in _nodes(model) if test(node))


def _is_quantized(node: ir.Node) -> bool:
    """Whether it multiplies by quantized weights: by itself, or after a DequantizeLinear of constants."""
    if (node.domain, node.op_type) in QUANTIZED_PRODUCTS:
        return True
    if (node.domain, node.op_type) not in PRODUCTS:
        return False
    return any(_is_stored_quantized(value) for value in node.inputs[:2] if value is not None)


def _is_stored_quantized(value: ir.Value) -> bool:
    """Whether it is a constant weight that a DequantizeLinear restores; a quantized activation is none."""
    node = _origin(value).producer()
    if node is None or (node.domain, node.op_type) != ("", "DequantizeLinear") or node.inputs[0] is None:
        return False
    return _is_constant_matrix(node.inputs[0])


def _has_constant_weight(node: ir.Node) -> bool:
    if (node.domain, node.op_type) not in PRODUCTS:
        return False
    return any(_is_constant_matrix(value) for value in node.inputs[:2] if value is not None)


def _is_constant_matrix(value: ir.Value) -> bool:
    """Whether it is an initializer of at least two dimensions, seen through casts …"""
    origin = _origin(value)
    tensor = origin.const_value
    return origin.producer() is None and tensor is not None and len(tensor.shape) >= 2


def _origin(value: ir.Value) -> ir.Value:
    """What `value` is made of, seen through casts, transpositions …"""
    node = value.producer()
    while node is not None and node.op_type in PASSED_THROUGH and node.inputs and node.inputs[0] is not None:
        value = node.inputs[0]
        node = value.producer()
    return value


def _compare_torch(before: Artifact, after: Artifact, idle: EffectKind) -> Effect:
    """By the tensors, the configuration and the module transforms; no model is built."""
    names = {(part, name) for part, component in after.manifest.components.items() for name in component.tensors}
    old = {(part, name) for part, component in before.manifest.components.items() for name in component.tensors}
    changed = sum(1 for part, name in names if (part, name) not in old or not _same_tensor(before, after, part, name))
    if changed or names != old:
        return Effect(kind="weights", weights_changed=(changed, len(names)))
    same_modules = before.manifest.transforms == after.manifest.transforms
    same_config = canonical_json(before.read_json("config.json")) == canonical_json(after.read_json("config.json"))
    return Effect(kind=idle if same_modules and same_config else "graph", weights_changed=(0, len(names)))


def _same_tensor(before: Artifact, after: Artifact, component: str, name: str) -> bool:
    """Whether both hold the same values; the bytes are read only where they lie in different places."""
    import numpy as np

    old, new = (a.manifest.components[component].tensors[name] for a in (before, after))
    if (old.dtype, old.shape) != (new.dtype, new.shape):
        return False
    if _place(before, component, old) == _place(after, component, new):
        return True
    return np.array_equal(_bytes(before.tensor(name, component)), _bytes(after.tensor(name, component)))


def _place(artifact: Artifact, component: str, ref: TensorRef) -> Place:
    return artifact.manifest.components[component].files[ref.file].digest, ref.offset, ref.length


def _bytes(array: np.ndarray) -> np.ndarray:
    import numpy as np

    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
