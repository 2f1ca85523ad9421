"""The fingerprint of a graph: what it computes, without regard to names.

It is built from the inputs up: the hash of a value is that of its node's operator, attributes and input values. The
hash of the graph is over the multiset of its nodes' hashes and its outputs in order. Weights, which are the constants
that lie outside the graph or take more than 1 KB, enter either as data type and shape (the structure) or with their
contents, too. An attribute that is written out with the value that its operator gives it in any case counts as left
out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

Place = tuple[str, int, int]
"""(digest of a file, offset, length): equal places hold equal bytes."""

WEIGHT_BYTES = 1024
"""Constants up to this size inside the graph are shapes, axes and scalars as much as weights: they are structure."""


def graph_fingerprint(model: ir.Model, *, contents: bool = True, known: Mapping[Place, Hashable] | None = None) -> str:
    """SHA-256 of a graph without regard to names.

    With `contents` False, weights count by data type and shape only. Those in `known` places count by what it says of
    the place, equal for equal bytes, and are not read. Operator sets that no node uses do not count.
    """
    hashed = GraphHash(contents=contents, known=known, opsets=model.opset_imports)
    functions = sorted(
        (*map(str, key), function_hash(function, contents=contents)) for key, function in model.functions.items()
    )
    opsets = _used_opsets(model.opset_imports, (node for graph in model.graphs() for node in graph))
    return hash_of(hashed.graph(model.graph, {}), functions, opsets).hex()


def function_hash(function: ir.Function, *, contents: bool) -> bytes:
    """Hash of a function of a model: its nodes, the attributes that it takes, and the operator sets that it uses."""
    hashed = GraphHash(contents=contents, opsets=function.opset_imports)
    takes = sorted((name, hashed.attribute(attribute, {})) for name, attribute in function.attributes.items())
    opsets = _used_opsets(function.opset_imports, function)
    return hash_of("function", hashed.graph(function.graph, {}), takes, opsets)


def _used_opsets(opsets: Mapping[str, int], nodes: Iterable[ir.Node]) -> list[tuple[str, int]]:
    used = {node.domain for node in nodes}
    return sorted((str(domain), version) for domain, version in opsets.items() if domain in used)


class GraphHash:
    """Hashes of nodes and graphs; see `graph_fingerprint`."""

    def __init__(
        self,
        *,
        contents: bool,
        known: Mapping[Place, Hashable] | None = None,
        opsets: Mapping[str, int] | None = None,
    ) -> None:
        self._contents = contents
        self._opsets = opsets or {}
        self._known = known or {}

    def graph(self, graph: ir.Graph, outer: dict[ir.Value, bytes]) -> bytes:
        """Hash of a graph; `outer` are the hashes of the values that a subgraph can see."""
        values = dict(outer)
        nodes = self.nodes(graph, values)
        return hash_of("graph", sorted(nodes.values()), [values.get(value, b"unknown") for value in graph.outputs])

    def nodes(self, graph: ir.Graph, values: dict[ir.Value, bytes]) -> dict[ir.Node, bytes]:
        """Hash of each node with all that it is computed from, in order; those of values are added to `values`."""
        for place, value in enumerate(graph.inputs):
            shape = value.shape
            sizes = None if shape is None else [size if isinstance(size, int) else "any" for size in shape]
            values[value] = hash_of("input", place, str(value.dtype), sizes)
        for value in graph.initializers.values():
            if value not in values:
                values[value] = self.initializer(value)
        nodes = {}
        for node in in_order(graph):
            own = hash_of(
                "node",
                *self.operator(node, values),
                [values.get(value, b"unknown") if value is not None else b"" for value in node.inputs],
            )
            nodes[node] = own
            for place, value in enumerate(node.outputs):
                values[value] = hash_of("output", own, place)
        return nodes

    def alone(self, node: ir.Node) -> bytes:
        """Hash of a node with its weights, but not with what else it takes."""
        inputs = [
            b"" if value is None else self.initializer(value) if value.is_initializer() else b"value"
            for value in node.inputs
        ]
        return hash_of("alone", *self.operator(node, self._seen_by_subgraphs(node)), inputs, len(node.outputs))

    def operator(self, node: ir.Node, values: dict[ir.Value, bytes]) -> tuple[Any, ...]:
        """Domain, type and attributes; an attribute may be a graph that sees `values`."""
        attributes = sorted(
            (name, self.attribute(attribute, values))
            for name, attribute in node.attributes.items()
            if not is_default(node, attribute, self._opsets)
        )
        return node.domain, node.op_type, attributes

    def initializer(self, value: ir.Value) -> bytes:
        """By contents, by place, or by data type and shape alone."""
        from pipeline.stored_tensor import StoredTensor

        tensor = value.const_value
        if tensor is None:
            return hash_of("initializer without a value")
        kind = ("initializer", tensor.dtype.name, [str(size) for size in tensor.shape])
        if not isinstance(tensor, StoredTensor):
            return hash_of(*kind, _digest(value, tensor) if self._is_told(tensor) else b"")
        place = (tensor.entry.digest, tensor.ref.offset, tensor.ref.length) if tensor.entry else None
        if place is not None and place in self._known:
            return hash_of(*kind, self._known[place])
        if not self._contents:
            return hash_of(*kind)
        return hash_of(*kind, hashlib.sha256(bytes_of(tensor.numpy()).data).digest())

    def _is_told(self, tensor: ir.TensorProtocol) -> bool:
        """Whether the values of a tensor that the graph itself holds count."""
        return self._contents or tensor.nbytes <= WEIGHT_BYTES

    def _seen_by_subgraphs(self, node: ir.Node) -> dict[ir.Value, bytes]:
        """The weights around a node whose attributes are graphs: these may read them."""
        import onnx_ir as ir

        graphs = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
        if node.graph is None or not any(attribute.type in graphs for attribute in node.attributes.values()):
            return {}
        return {value: self.initializer(value) for value in node.graph.initializers.values()}

    def attribute(self, attribute: ir.Attr, values: dict[ir.Value, bytes]) -> Any:
        """What prints alike for equal attributes; one that refers to a function's is equal where that is."""
        import onnx_ir as ir

        kind = attribute.type
        if attribute.is_ref():
            return kind.name, "reference", attribute.ref_attr_name
        if attribute.value is None:  # that a function takes and gives no default
            return kind.name, "none"
        if kind == ir.AttributeType.GRAPH:
            return self.graph(attribute.as_graph(), values)
        if kind == ir.AttributeType.GRAPHS:
            return [self.graph(graph, values) for graph in attribute.as_graphs()]
        if kind == ir.AttributeType.TENSOR:
            tensor = attribute.as_tensor()
            value = tensor.tobytes() if self._is_told(tensor) else b""
            return tensor.dtype.name, [str(size) for size in tensor.shape], value
        return kind.name, repr(attribute.value)


def _digest(value: ir.Value, tensor: ir.TensorProtocol) -> bytes:
    """SHA-256 of a tensor that the graph itself holds; remembered with the value, for it may be a large weight."""
    known = value.meta.get("digest")
    if known is None or known[0] is not tensor:
        known = value.meta["digest"] = (tensor, hashlib.sha256(tensor.tobytes()).digest())
    digest: bytes = known[1]
    return digest


def is_default(node: ir.Node, attribute: ir.Attr, opsets: Mapping[str, int]) -> bool:
    """Whether the attribute says no more than its operator's definition; not known of other domains than ONNX's own."""
    if node.domain or (version := opsets.get("")) is None:
        return False
    defaults = _defaults(node.op_type, version)
    if attribute.name not in defaults:
        return False
    value = attribute.value
    return bool(defaults[attribute.name] == (list(value) if isinstance(value, tuple) else value))


@cache
def _defaults(operator: str, version: int) -> dict[str, Any]:
    """The values that an operator's attributes have where they are left out."""
    import onnx

    try:
        schema = onnx.defs.get_schema(operator, version, "")
    except onnx.defs.SchemaError:  # a function of the model, or an operator of another time
        return {}
    found = {}
    for name, attribute in schema.attributes.items():
        if attribute.default_value.type:
            value = onnx.helper.get_attribute_value(attribute.default_value)
            found[name] = value.decode() if isinstance(value, bytes) else value
    return found


def hash_of(*parts: Any) -> bytes:
    """SHA-256 of values that print alike in every process."""
    return hashlib.sha256(repr(parts).encode()).digest()


def in_order(graph: ir.Graph) -> Iterator[ir.Node]:
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


def bytes_of(array: np.ndarray) -> np.ndarray:
    """The array as bytes, one after another."""
    import numpy as np

    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
