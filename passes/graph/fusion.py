"""Fusion rules as data: what a rule looks at, and what it makes of each of them or why it leaves it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx_ir as ir

MICROSOFT = "com.microsoft"
"""Domain of ONNX Runtime's own operators."""


class NotFusedError(Exception):
    """A rule leaves a node as it is. Its text says why, and completes "…: NODE is left, since …"."""


@dataclass(frozen=True)
class Rule:
    """A rewrite of single nodes, each of which it replaces or leaves."""

    name: str
    candidates: Callable[[ir.Graph], Sequence[ir.Node]]
    """The nodes that the rule is about: those that it counts."""
    rewrite: Callable[[ir.Node, Any], None]
    """(node, the graph's surroundings): replaces the node. Raises NotFusedError before it has changed anything."""


@dataclass(frozen=True)
class Left:
    """A node that a rule left, and why."""

    node: str
    reason: str


@dataclass(frozen=True)
class Outcome:
    """What a rule did to a graph."""

    rule: str
    done: int
    of: int
    left: tuple[Left, ...] = ()


def apply_rule(rule: Rule, graph: ir.Graph, surroundings: Any) -> Outcome:
    """Rewrite every candidate that the rule takes."""
    left: list[Left] = []
    nodes = list(rule.candidates(graph))
    for node in nodes:
        try:
            rule.rewrite(node, surroundings)
        except NotFusedError as refusal:
            left.append(Left(place_of(node), str(refusal)))
    return Outcome(rule.name, len(nodes) - len(left), len(nodes), tuple(left))


def place_of(node: ir.Node) -> str:
    """The module that a node comes from, such as model.layers.3.self_attn, else the node's own name."""
    scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
    names = [name.strip(" '\"") for name in scopes.strip("[]").split(",")]
    return next((name for name in reversed(names[:-1]) if name), str(node.name or node.op_type))


def describe(value: ir.Value, *, name: str, dtype: ir.DataType | None, shape: Sequence[Any]) -> ir.Value:
    """Name a new value and say what it is; returns it."""
    import onnx_ir as ir

    value.name, value.shape = name, ir.Shape(shape)
    if dtype is not None:
        value.dtype = dtype
    return value


def put_in_place(old: ir.Node, nodes: Sequence[ir.Node], outputs: Sequence[tuple[ir.Value, ir.Value]]) -> None:
    """Insert `nodes` behind `old`, with its metadata, and let the second of each pair take the place of the first."""
    import onnx_ir as ir

    assert old.graph is not None
    for node in nodes:
        for key, value in old.metadata_props.items():
            node.metadata_props.setdefault(key, value)
    before, after = zip(*outputs, strict=True)
    ir.convenience.replace_nodes_and_values(old.graph, old, [], nodes, before, after)
    for position, value in enumerate(before):  # two values of one name are no graph
        value.name = f"{value.name}.replaced{position}"


def int64_constant(graph: ir.Graph, name: str, values: Sequence[int]) -> ir.Value:
    """The initializer int64 of that name, made where it is not there."""
    import numpy as np
    import onnx_ir as ir

    if name in graph.initializers:
        return graph.initializers[name]
    tensor = ir.Tensor(np.array(values, np.int64), name=name)
    value = ir.Value(
        name=name, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([len(values)]), const_value=tensor
    )
    graph.register_initializer(value)
    return value
