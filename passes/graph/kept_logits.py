"""Logits of the last positions alone: what follows the last attention is computed for those that are asked for.

A prompt's next token needs the logits of its last position. The nodes that only the logits need, from the last
attention on, work position by position; a Slice before them leaves them as many positions as `logits_to_keep` says.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from passes.graph.fusion import NotFusedError, describe, int64_constant
from passes.graph.part_of_graph import ancestors

if TYPE_CHECKING:
    import onnx_ir as ir

INPUT = "logits_to_keep"

EVERYTHING = 2**63 - 1
"""An end that every Slice takes for the end of the axis."""

BY_POSITION = frozenset({
    "Add", "Sub", "Mul", "Div", "Pow", "Neg", "Sqrt", "Reciprocal", "Cast", "Identity", "Erf", "Tanh", "Sigmoid",
    "Relu", "Gelu", "Clip", "Abs", "Exp", "Where", "Min", "Max", "HardSwish", "Elu", "LeakyRelu", "Softplus", "Swish",
    "MatMul", "Gemm", "RMSNormalization", "LayerNormalization", "SimplifiedLayerNormalization",
    "SkipSimplifiedLayerNormalization", "SkipLayerNormalization", "QuickGelu", "FastGelu", "BiasGelu",
    "MatMulNBits", "Split", "Slice", "Concat",
})  # fmt: skip
"""Operators that treat each position [B, S, …] by itself, some of them with certain operands or attributes only.
DynamicQuantizeMatMul is none: it scales its input by the largest value of all positions."""


def keep_last_logits(graph: ir.Graph, *, logits: str, others: Collection[str]) -> int:
    """Add the input `logits_to_keep` int64 [1], and return how many values are cut where.

    `others` are the graph's further outputs, which stay whole.

    Raises: NotFusedError where what the logits alone need does not work position by position.
    """
    import onnx_ir as ir

    value = next(output for output in graph.outputs if output.name == logits)
    shared = set(ancestors([output for output in graph.outputs if output.name in others])[0])
    varying = _varying(graph)
    region = [node for node in ancestors([value])[0] if node not in shared and node.outputs[0] in varying]
    if not region:
        raise NotFusedError("everything before the logits is needed for the cache, too")
    inside = {output for node in region for output in node.outputs}
    border: dict[ir.Value, list[tuple[ir.Node, int]]] = {}
    for node in region:
        for index, source in enumerate(node.inputs):
            if source is None or source in inside or source not in varying:
                continue
            border.setdefault(source, []).append((node, index))
    for node in region:
        _check(node, inside | border.keys())
    for source in border:
        if source.shape is None or len(source.shape) != 3:
            raise NotFusedError(f"{source.name} is not [batch, sequence, width]")
    count = ir.Value(name=INPUT, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([1]))
    graph.inputs.append(count)
    begin = ir.node("Neg", [count], name=f"{INPUT}.begin")
    describe(begin.outputs[0], name=f"{INPUT}.begin.value", dtype=ir.DataType.INT64, shape=[1])
    graph.insert_before(graph[0], begin)
    end, axis = (int64_constant(graph, f"{INPUT}.{n}", [v]) for n, v in (("end", EVERYTHING), ("axis", 1)))
    for source, users in border.items():
        first = min((node for node, _ in users), key=graph.index)
        cut = ir.node("Slice", [source, begin.outputs[0], end, axis], name=f"{source.name}.last")
        assert source.shape is not None
        kept = [source.shape[0], "kept", source.shape[2]]
        describe(cut.outputs[0], name=f"{source.name}.last.value", dtype=source.dtype, shape=kept)
        cut.metadata_props.update(first.metadata_props)
        graph.insert_before(first, cut)
        for node, index in users:
            node.replace_input_with(index, cut.outputs[0])
    for node in region:
        for output in node.outputs:
            if output.shape is not None and len(output.shape) == 3:
                output.shape = ir.Shape([output.shape[0], "kept", output.shape[2]])
    return len(border)


def _varying(graph: ir.Graph) -> set[ir.Value]:
    """The values that follow from the graph's inputs."""
    found = set(graph.inputs)
    for node in graph:
        if any(value in found for value in node.inputs):
            found.update(node.outputs)
    return found


def _check(node: ir.Node, moving: Collection[ir.Value]) -> None:
    """Raises: NotFusedError where a node could mix positions.

    `moving` are the values [B, S, width] that the region computes with.
    """
    if node.op_type not in BY_POSITION:
        raise NotFusedError(f"{node.op_type} follows the last attention, and may mix positions")
    if any(value in moving for value in node.inputs[1:2]) and node.op_type in ("MatMul", "Gemm"):
        raise NotFusedError(f"{node.name} multiplies two activations, and may mix positions")
    if node.op_type in ("Split", "Concat") and node.attributes.get_int("axis", 0) not in (2, -1):
        raise NotFusedError(f"{node.op_type} follows the last attention along another axis than the last")
    if node.op_type == "Slice":
        axes = node.inputs[3].const_value if len(node.inputs) > 3 and node.inputs[3] is not None else None
        if axes is None or any(int(axis) not in (2, -1) for axis in axes.numpy().reshape(-1)):
            raise NotFusedError("a Slice follows the last attention along another axis than the last")
