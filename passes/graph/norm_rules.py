"""Normalizations as ONNX Runtime's own operators, the addition before them inside."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from passes.graph.fusion import MICROSOFT, NotFusedError, Rule, put_in_place
from passes.graph.part_of_graph import ancestors, compute

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

GAIN_BYTES = 1 << 20
"""Gains up to this size are computed and written anew; the weights of a product are no gains."""

NORMS = {"RMSNormalization": "SkipSimplifiedLayerNormalization", "LayerNormalization": "SkipLayerNormalization"}
"""Operator -> the one that adds before it normalizes."""

SUM = 3
"""Position of the sum among the outputs of those."""


@dataclass(frozen=True)
class Gains:
    """How to compute and to keep a gain."""

    opsets: Mapping[str, int]
    add_tensor: Callable[[str, np.ndarray], ir.Value]
    """(name, values) -> a new initializer."""


def fold_gain() -> Rule:
    """The gain of a norm is one initializer, not something computed from one, such as 1 + w or a cast."""
    return Rule("fold_gain", _computed_gains, _fold)


def skip_normalization() -> Rule:
    """A norm of a sum is one operator, which gives the sum, too."""
    return Rule("skip_normalization", _norms_of_sums, _join)


def simplified_normalization() -> Rule:
    """A norm alone is ONNX Runtime's own operator, which has a kernel of its own."""
    return Rule("simplified_normalization", _plain_norms, _rename)


def _norms(graph: ir.Graph) -> list[ir.Node]:
    return [node for node in graph if node.op_type in NORMS and not node.domain]


def _computed_gains(graph: ir.Graph) -> list[ir.Node]:
    def computed(value: ir.Value | None) -> bool:
        return value is not None and value.producer() is not None and _is_constant(value)

    return [node for node in _norms(graph) if any(computed(value) for value in node.inputs[1:])]


def _is_constant(value: ir.Value) -> bool:
    return all(leaf.const_value is not None and not leaf.is_graph_input() for leaf in ancestors([value])[1])


def _fold(node: ir.Node, gains: Gains) -> None:
    for index, value in enumerate(node.inputs):
        if index == 0 or value is None or value.producer() is None:
            continue
        leaves = ancestors([value])[1]
        size = sum(leaf.const_value.nbytes for leaf in leaves if leaf.const_value is not None)
        if size > GAIN_BYTES:
            raise NotFusedError(f"its gain follows from {size} bytes")
        (array,) = compute([value], {}, gains.opsets)
        stem = max(leaves, key=lambda leaf: leaf.const_value.nbytes if leaf.const_value is not None else 0).name
        folded = gains.add_tensor(f"{stem}.gain", array)
        value.replace_all_uses_with(folded)


def _norms_of_sums(graph: ir.Graph) -> list[ir.Node]:
    return [node for node in _norms(graph) if _sum_before(node) is not None]


def _sum_before(node: ir.Node) -> ir.Node | None:
    """The Add of two values of one shape that is normalized, if any."""
    value = node.inputs[0]
    add = value.producer() if value is not None else None
    if add is None or add.op_type != "Add" or add.domain:
        return None
    shapes = [list(v.shape) if v is not None and v.shape is not None else None for v in add.inputs]
    alike = shapes[0] is not None and len(shapes[0]) == 3 and shapes[0] == shapes[1]
    return add if alike else None


def _join(node: ir.Node, _: Gains) -> None:
    import onnx_ir as ir

    add = _sum_before(node)
    assert add is not None
    _check_last_axis(node)
    gains = list(node.inputs[1:])
    if any(value is not None and value.producer() is not None for value in gains):
        raise NotFusedError("its gain is computed")
    fused = ir.node(
        NORMS[node.op_type],
        [*add.inputs, *gains],
        {"epsilon": node.attributes.get_float("epsilon", 1e-5)},
        domain=MICROSOFT,
        num_outputs=SUM + 1,
        name=f"{node.name}.skip",
        version=1,
    )
    fused.metadata_props.update(node.metadata_props)
    added = add.outputs[0]
    for position in range(1, SUM):
        fused.outputs[position].name = ""
    # the sum's other users may stand before the norm: the operator takes the Add's place
    put_in_place(add, [fused], [(added, fused.outputs[SUM]), (node.outputs[0], fused.outputs[0])])
    if not fused.outputs[SUM].uses() and not fused.outputs[SUM].is_graph_output():
        fused.outputs[SUM].name = ""
    assert node.graph is not None
    node.graph.remove([node, add], safe=True)


def _plain_norms(graph: ir.Graph) -> list[ir.Node]:
    return [node for node in _norms(graph) if node.op_type == "RMSNormalization"]


def _rename(node: ir.Node, _: Gains) -> None:
    import onnx_ir as ir

    _check_last_axis(node)
    attributes = {
        "epsilon": node.attributes.get_float("epsilon", 1e-5),
        "axis": -1,
        "stash_type": node.attributes.get_int("stash_type", 1),
    }
    plain = ir.node("SimplifiedLayerNormalization", node.inputs, attributes, name=node.name, version=1)
    put_in_place(node, [plain], [(node.outputs[0], plain.outputs[0])])
    assert node.graph is not None
    node.graph.remove(node, safe=True)


def _check_last_axis(node: ir.Node) -> None:
    """Raises: NotFusedError where the norm is over other axes than the last."""
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    axis = node.attributes.get_int("axis", -1)
    if axis != -1 and (shape is None or axis != len(shape) - 1):
        raise NotFusedError(f"it normalizes from axis {axis} on")
