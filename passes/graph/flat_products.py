"""Products over [batch · sequence, width] as products over [batch, sequence, width], which other rules can follow."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from passes.graph.fusion import NotFusedError, Rule, describe, put_in_place

if TYPE_CHECKING:
    import onnx_ir as ir


def flat_product() -> Rule:
    """A Gemm between two Reshapes, of which one joins batch and sequence and the other parts them again."""
    return Rule("flat_product", _flat_gemms, _unflatten)


def same_shape() -> Rule:
    """A Reshape of [batch, sequence, width] to itself is nothing."""
    return Rule("same_shape", _idle_reshapes, _skip)


def _flat_gemms(graph: ir.Graph) -> list[ir.Node]:
    return [node for node in graph if node.op_type == "Gemm" and not node.domain and _ends(node) is not None]


def _ends(node: ir.Node) -> tuple[ir.Node, ir.Node] | None:
    """The Reshape [B, S, …] -> [B · S, K] before a Gemm and the Reshape [B · S, N] -> [B, S, N] after it."""
    before = node.inputs[0].producer() if node.inputs[0] is not None else None
    users = node.outputs[0].consumers()
    after = users[0] if len(users) == 1 and not node.outputs[0].is_graph_output() else None
    if before is None or after is None or before.op_type != "Reshape" or after.op_type != "Reshape":
        return None
    source, flat, product, result = (
        list(value.shape) if value is not None and value.shape is not None else []
        for value in (before.inputs[0], before.outputs[0], node.outputs[0], after.outputs[0])
    )
    if len(source) < 3 or len(flat) != 2 or len(product) != 2 or len(result) != 3:
        return None
    widths = source[2:]
    whole = all(isinstance(width, int) for width in widths) and math.prod(widths) == flat[1]
    return (before, after) if whole and source[:2] == result[:2] and product[1] == result[2] else None


def _unflatten(node: ir.Node, _: Any) -> None:
    import numpy as np
    import onnx_ir as ir

    ends = _ends(node)
    assert ends is not None
    before, after = ends
    attributes = node.attributes
    if attributes.get_float("alpha", 1.0) != 1.0 or attributes.get_float("beta", 1.0) != 1.0:
        raise NotFusedError("it scales its operands")
    if attributes.get_int("transA", 0):
        raise NotFusedError("it transposes its input")
    weight, bias = node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None and (bias.shape is None or len(bias.shape) != 1):
        raise NotFusedError("its addend is no bias")
    source, result = before.inputs[0], after.outputs[0]
    assert source is not None and source.shape is not None and result.shape is not None
    assert weight is not None and before.outputs[0].shape is not None
    made: list[ir.Node] = []

    def add(op_type: str, inputs: list[ir.Value], attributes: dict[str, Any], shape: list[Any]) -> ir.Value:
        new = ir.node(op_type, inputs, attributes, name=f"{node.name}.{op_type.lower()}")
        made.append(new)
        name = f"{node.outputs[0].name}.{op_type.lower()}"
        return describe(new.outputs[0], name=name, dtype=result.dtype, shape=shape)

    rows = list(source.shape)[:2]
    if len(source.shape) > 3:
        width = int(before.outputs[0].shape[1])  # type: ignore[arg-type]
        shape = ir.Value(
            name=f"{node.name}.joined_shape",
            type=ir.TensorType(ir.DataType.INT64),
            shape=ir.Shape([3]),
            const_value=ir.Tensor(np.array([0, 0, width]), name=f"{node.name}.joined_shape"),
        )
        assert node.graph is not None
        node.graph.register_initializer(shape)  # type: ignore[union-attr]
        source = add("Reshape", [source, shape], {"allowzero": 0}, [*rows, width])
    if attributes.get_int("transB", 0):
        assert weight.shape is not None
        turned = [weight.shape[1], weight.shape[0]]
        weight = add("Transpose", [weight], {"perm": [1, 0]}, turned)
    product = add("MatMul", [source, weight], {}, list(result.shape))
    last = add("Add", [product, bias], {}, list(result.shape)) if bias is not None else product
    put_in_place(node, made, [(result, last)])


def _idle_reshapes(graph: ir.Graph) -> list[ir.Node]:
    return [node for node in graph if node.op_type == "Reshape" and not node.domain and _is_idle(node)]


def _is_idle(node: ir.Node) -> bool:
    shapes = [v.shape if v is not None else None for v in (node.inputs[0], node.outputs[0])]
    before, after = shapes
    return (
        before is not None
        and after is not None
        and len(before) == 3
        and list(before) == list(after)
        and isinstance(after[2], int)
        and not node.outputs[0].is_graph_output()
    )


def _skip(node: ir.Node, _: Any) -> None:
    assert node.inputs[0] is not None
    node.outputs[0].replace_all_uses_with(node.inputs[0])
