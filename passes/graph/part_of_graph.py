"""A part of a graph, computed: what a mask masks and what a rotary table holds is what the graph itself says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import onnx
    import onnx_ir as ir


class DependsOnOthersError(Exception):
    """The part needs inputs of the graph that were not given, whose names its text lists."""


def ancestors(values: Iterable[ir.Value], given: Iterable[ir.Value] = ()) -> tuple[list[ir.Node], list[ir.Value]]:
    """(the nodes that compute `values`, in the graph's order; the inputs and initializers that they start from).

    What is `given` is not looked behind.
    """
    stop = set(given)
    nodes: set[ir.Node] = set()
    leaves: dict[ir.Value, None] = {}
    waiting = list(values)
    seen: set[ir.Value] = set()
    while waiting:
        value = waiting.pop()
        if value in seen:
            continue
        seen.add(value)
        node = value.producer()
        if node is None or value in stop:
            leaves[value] = None
        elif node not in nodes:
            nodes.add(node)
            waiting += [source for source in node.inputs if source is not None]
    if not nodes:
        return [], list(leaves)
    graph = next(iter(nodes)).graph
    assert graph is not None
    return [node for node in graph if node in nodes], list(leaves)


def compute(
    values: Sequence[ir.Value], given: Mapping[ir.Value, np.ndarray], opsets: Mapping[str, int]
) -> list[np.ndarray]:
    """The values where those that are `given` hold these arrays, as ONNX Runtime computes them.

    `given` arrays may have other sizes than the graph says, as long as what is computed does not mind.

    Raises: DependsOnOthersError where the values need further inputs of the graph.
    """
    import onnx
    import onnx_ir as ir
    import onnxruntime

    nodes, leaves = ancestors(values, given)
    missing = [str(leaf.name) for leaf in leaves if leaf not in given and leaf.const_value is None]
    if missing:
        raise DependsOnOthersError(", ".join(sorted(missing)))
    inputs = [leaf for leaf in leaves if leaf in given]
    graph = onnx.helper.make_graph(
        [ir.to_proto(node) for node in nodes],
        "part",
        [_declared(value, given[value]) for value in inputs],
        [onnx.ValueInfoProto(name=str(value.name)) for value in values],
        [
            onnx.numpy_helper.from_array(leaf.const_value.numpy(), str(leaf.name))
            for leaf in leaves
            if leaf.const_value is not None and leaf not in given
        ],
    )
    imports = [onnx.helper.make_opsetid(domain, version) for domain, version in opsets.items()]
    model = onnx.helper.make_model(graph, opset_imports=imports, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = {str(value.name): given[value] for value in inputs}
    made: list[np.ndarray] = session.run([str(value.name) for value in values], feeds)
    return made


def _declared(value: ir.Value, array: np.ndarray) -> onnx.ValueInfoProto:
    """An input of the array's rank and of no particular sizes."""
    import onnx
    import onnx_ir as ir

    dtype = int(ir.DataType.from_numpy(array.dtype))
    return onnx.helper.make_tensor_value_info(str(value.name), dtype, [None] * array.ndim)
