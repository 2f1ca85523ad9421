"""Weights laid aside while a tool that takes a whole model in memory rewrites the graph, and put back by name.

While aside, a weight is an input of the graph: a value that a tool can neither read, merge, fold nor copy. What the
tool left as it was refers to the same bytes afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline import Artifact, PassContext, PipelineError, new_tensor

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass
class Original:
    """What has to survive a tool: the graph's signature, its weights, and what its nodes say of their origin."""

    inputs: dict[str, ir.Value]
    outputs: dict[str, ir.Value]
    tensors: dict[str, ir.TensorProtocol]
    metadata: dict[str, tuple[str, dict[str, str]]]  # first output -> (operator, metadata)
    aside: dict[str, ir.TensorProtocol] = field(default_factory=dict)


def original_of(model: ir.Model) -> Original:
    """Remember the graph before a tool changes it. Local functions are inlined, as no tool sees through them."""
    if model.functions:
        from onnx_ir.passes.common import InlinePass

        InlinePass()(model)
    graph = model.graph
    return Original(
        inputs={str(value.name): value for value in graph.inputs},
        outputs={str(value.name): value for value in graph.outputs},
        tensors={
            name: value.const_value for name, value in graph.initializers.items() if value.const_value is not None
        },
        metadata={
            str(node.outputs[0].name): (node.op_type, dict(node.metadata_props))
            for node in graph
            if node.outputs and node.metadata_props
        },
    )


def lay_aside(model: ir.Model, original: Original, chosen: Callable[[ir.Value], bool]) -> None:
    """Make inputs of the chosen initializers. Those that the graph gives out as they are stay."""
    graph = model.graph
    for name, value in list(graph.initializers.items()):
        if name in original.tensors and not value.is_graph_input() and not value.is_graph_output() and chosen(value):
            original.aside[name] = original.tensors[name]
            del graph.initializers[name]
            graph.inputs.append(value)
            value.const_value = None
            value.dtype, value.shape = original.aside[name].dtype, _shape(original.aside[name])


def put_back(model: ir.Model, original: Original, context: PassContext, *, tool: str) -> None:
    """Give a rewritten graph its weights, signature and metadata again.

    An initializer with the name, or else the bytes, of one before refers to where that lies; others are written. A
    weight that nothing reads any more is dropped.

    Raises: PipelineError where the tool changed the graph's inputs or outputs.
    """
    graph = model.graph
    for value in [value for value in graph.inputs if value.name in original.aside]:
        graph.inputs.remove(value)
        if value.uses():
            value.const_value = original.aside[str(value.name)]
            graph.initializers[str(value.name)] = value
    _refer_to_known_bytes(graph, original, context)
    _restore_signature("inputs", graph.inputs, original.inputs, tool)
    _restore_signature("outputs", graph.outputs, original.outputs, tool)
    for node in graph:
        operator, metadata = original.metadata.get(str(node.outputs[0].name) if node.outputs else "", ("", {}))
        if operator == node.op_type:
            node.metadata_props.update(metadata)


def keep_used_opsets(model: ir.Model) -> None:
    """Drop the imports of operator sets that no node uses: tools import every one that they know."""
    used = {node.domain for graph in model.graphs() for node in graph} | {""}
    for domain in [domain for domain in model.opset_imports if domain not in used]:
        del model.opset_imports[domain]


def execution_of_graph(artifact: Artifact) -> dict[str, Any]:
    """How to load a graph made from this artifact's: what was said of its compiled form does not hold any more."""
    return {key: value for key, value in artifact.manifest.execution.items() if key != "compiled"}


def _shape(tensor: ir.TensorProtocol) -> ir.Shape:
    import onnx_ir as ir

    return ir.Shape(tensor.shape.numpy())


def _refer_to_known_bytes(graph: ir.Graph, original: Original, context: PassContext) -> None:
    import onnx_ir as ir

    stored = {name: tensor for name, tensor in original.tensors.items() if isinstance(tensor, ir.LazyTensor)}
    alike: dict[Any, list[ir.TensorProtocol]] = {}
    for tensor in stored.values():
        alike.setdefault(_kind(tensor), []).append(tensor)
    for name, value in graph.initializers.items():
        made = value.const_value
        if made is None or isinstance(made, ir.LazyTensor):
            continue
        candidates = sorted(alike.get(_kind(made), []), key=lambda candidate: candidate.name != name)
        known = next((candidate for candidate in candidates if _same_bytes(made, candidate)), None)
        if known is not None:
            value.const_value = known
        elif isinstance(made, ir.ExternalTensor):  # it lies in a file that goes away with the tool's folder
            value.const_value = new_tensor(context.output, name, made.numpy())


def _kind(tensor: ir.TensorProtocol) -> Any:
    return tensor.dtype, tuple(tensor.shape)


def _same_bytes(tensor: ir.TensorProtocol, other: ir.TensorProtocol) -> bool:
    """Whether both hold the same values, bit for bit. The first page tells most that differ apart."""
    import numpy as np

    if _kind(tensor) != _kind(other):
        return False
    first, second = (np.ascontiguousarray(t.numpy()).reshape(-1).view(np.uint8) for t in (tensor, other))
    return np.array_equal(first[:4096], second[:4096]) and np.array_equal(first, second)


def _restore_signature(kind: str, values: Sequence[ir.Value], before: Mapping[str, ir.Value], tool: str) -> None:
    """Check names, order and data types, and give back the shapes, whose dimensions' names tools may lose."""
    names = [str(value.name) for value in values]
    if names != list(before):
        raise PipelineError(
            f"{tool} changed the graph's {kind} from {', '.join(before)} to {', '.join(names)}; "
            "a runner could not call it any more"
        )
    for value in values:
        was = before[str(value.name)]
        if value.dtype != was.dtype:
            raise PipelineError(f"{tool} changed the data type of {value.name!r} from {was.dtype} to {value.dtype}")
        value.shape = was.shape
