"""A float32 graph in float16, but for the operators that lose their meaning in it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline import Interface, PassContext, PipelineError, new_tensor

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

SINGLE_ONLY = frozenset(
    {
        *("CumSum", "DynamicQuantizeLinear", "DynamicQuantizeMatMul", "Range", "Resize", "TopK"),  # no float16 kernels
        *("Exp", "Pow", "ReduceMean", "ReduceSum", "Reciprocal", "Sqrt"),  # squares of activations pass float16's 65504
        *("Cos", "Sin"),  # and what they are computed from, see _kept_nodes
    }
)
"""Operators that compute in float32 still."""

LIKE_FIRST_INPUT = frozenset({"Cos", "Sin", "MatMulNBits", "QuickGelu", "FastGelu", "Gelu", "BiasGelu", "FusedMatMul"})
"""Operators whose result has the data type of their first input, where the graph leaves it out."""


def to_half_precision(model: ir.Model, interface: Interface, context: PassContext) -> Interface:
    """Change the graph in place, its weights one at a time, and return the interface with a float16 cache.

    Positions are turned into angles in float32: in float16 they have no fractions above 1,024.

    Raises: PipelineError where the graph has subgraphs, or does not say its values' data types.
    """
    graph = model.graph
    _check_types(graph)
    kept = _kept_nodes(graph)
    casts = _Casts(graph, context)
    for given in graph.inputs:
        casts.halve(given)
    for node in list(graph):
        for index, value in enumerate(node.inputs):
            if value is not None and casts.is_single(value) is (node not in kept):
                node.replace_input_with(index, casts.other(value, node))
        if node not in kept:
            _halve_attributes(node)
            for output in node.outputs:
                casts.halve(output)
    for index, output in enumerate(graph.outputs):
        if casts.is_single(output):
            name, output.name = output.name, f"{output.name}.float32"
            graph.outputs[index] = casts.other(output, None)
            graph.outputs[index].name = name
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]
    cache = interface.cache.model_copy(update={"dtype": "float16"}) if interface.cache else None
    return interface.model_copy(update={"cache": cache})


def _check_types(graph: ir.Graph) -> None:
    """Raises: PipelineError where the graph has subgraphs, or a value whose data type it does not say."""
    for node in graph:
        if _has_subgraph(node):
            raise PipelineError(f"a graph with {node.op_type} cannot be converted to float16")
        first = node.inputs[0] if node.inputs else None
        if node.op_type in LIKE_FIRST_INPUT and node.outputs[0].dtype is None and first is not None and first.dtype:
            node.outputs[0].dtype = first.dtype
        if unknown := [value.name for value in node.outputs if value.dtype is None and value.name]:
            raise PipelineError(f"the graph does not say the data type of {unknown[0]!r}, which {node.op_type} gives")


class _Casts:
    """Values in the other precision, each made once."""

    def __init__(self, graph: ir.Graph, context: PassContext) -> None:
        self._graph = graph
        self._context = context
        self._halved: set[ir.Value] = set()
        self._made: dict[ir.Value, ir.Value] = {}

    def halve(self, value: ir.Value) -> None:
        """Let a float32 value be float16 from now on."""
        import onnx_ir as ir

        if value.dtype == ir.DataType.FLOAT:
            value.dtype = ir.DataType.FLOAT16
            self._halved.add(value)

    def is_single(self, value: ir.Value) -> bool | None:
        """Whether it is float32, or was and is float16 now; None for all others."""
        import onnx_ir as ir

        if value in self._halved:
            return False
        return True if value.dtype == ir.DataType.FLOAT else None

    def other(self, value: ir.Value, before: ir.Node | None) -> ir.Value:
        """A halved value in float32, or a float32 value in float16, made before that node or at the end."""
        import onnx_ir as ir

        if value not in self._made:
            dtype = ir.DataType.FLOAT16 if self.is_single(value) else ir.DataType.FLOAT
            is_weight = value.const_value is not None and value.is_initializer()
            self._made[value] = self._weight(value) if is_weight else self._cast(value, dtype, before)
        return self._made[value]

    def _weight(self, value: ir.Value) -> ir.Value:
        """The initializer in float16, clipped to its range, as a new one."""
        import onnx_ir as ir

        assert value.const_value is not None
        name = f"{value.name}.float16"
        tensor = new_tensor(self._context.output, name, _clipped(value.const_value.numpy()))
        made = ir.Value(
            name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor
        )
        self._graph.register_initializer(made)
        return made

    def _cast(self, value: ir.Value, dtype: ir.DataType, before: ir.Node | None) -> ir.Value:
        import onnx_ir as ir

        node = ir.node("Cast", [value], {"to": dtype}, name=f"{value.name}.to_{dtype.name.lower()}")
        node.outputs[0].name = f"{value.name}.{dtype.name.lower()}"
        node.outputs[0].dtype, node.outputs[0].shape = dtype, value.shape
        if before is None:
            self._graph.append(node)
        else:
            self._graph.insert_before(before, node)
        return node.outputs[0]


def _clipped(array: np.ndarray) -> np.ndarray:
    import numpy as np

    limit = np.finfo(np.float16).max
    halved: np.ndarray = np.clip(array, -limit, limit).astype(np.float16)
    return halved


def _kept_nodes(graph: ir.Graph) -> set[ir.Node]:
    """The nodes that stay in float32, those that angles are computed with among them."""
    kept = {node for node in graph if not node.domain and node.op_type in SINGLE_ONLY}
    kept |= {node for node in graph if node.op_type in ("DynamicQuantizeMatMul",)}
    waiting = [node for node in kept if node.op_type in ("Cos", "Sin")]
    while waiting:
        for value in waiting.pop().inputs:
            node = value.producer() if value is not None else None
            if node is not None and node not in kept:
                kept.add(node)
                waiting.append(node)
    return kept


def _halve_attributes(node: ir.Node) -> None:
    """Have a cast give float16, and a constant hold it."""
    import onnx_ir as ir

    if node.op_type == "Cast" and node.attributes.get_int("to", 0) == ir.DataType.FLOAT:
        node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT16)
    for name, attribute in list(node.attributes.items()):
        if attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == ir.DataType.FLOAT:
            node.attributes[name] = ir.AttrTensor(name, ir.Tensor(_clipped(attribute.as_tensor().numpy())))


def _has_subgraph(node: ir.Node) -> bool:
    import onnx_ir as ir

    return any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values())
