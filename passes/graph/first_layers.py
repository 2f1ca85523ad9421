"""A causal language model's graph cut after its first layers, to compare where the whole would be too large."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline import Interface

if TYPE_CHECKING:
    import onnx_ir as ir


def widened_bytes(model: ir.Model) -> int:
    """What the weights that are stored in half precision and computed with in float32 take as that."""
    import onnx_ir as ir

    half = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    stored = (v.const_value for v in model.graph.initializers.values() if _is_cast(v))
    return sum(4 * tensor.size for tensor in stored if tensor is not None and tensor.dtype in half)


def keep_first_layers(model: ir.Model, interface: Interface, layers: int) -> Interface:
    """Drop in place what the cache of the first `layers` does not need; returns how the rest is called.

    The keys and values of layer n follow from all that the layers before it compute.
    """
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    kept = {f"present.{part}[{layer}]" for layer in range(layers) for part in "kv"}
    outputs = {role: name for role, name in interface.outputs.items() if role in kept}
    graph = model.graph
    for value in [value for value in graph.outputs if value.name not in outputs.values()]:
        graph.outputs.remove(value)
    RemoveUnusedNodesPass()(model)
    pasts = {role.replace("present", "past") for role in outputs}
    by_name = {str(value.name): value for value in graph.inputs}
    for (
        role,
        name,
    ) in interface.inputs.items():  # of other layers only the shapes are left, which are those of the first
        if role.startswith("past.") and role not in pasts and name in by_name:
            by_name[name].replace_all_uses_with(by_name[interface.inputs["past.k[0]"]])
    inputs = {role: name for role, name in interface.inputs.items() if role in pasts or not role.startswith("past.")}
    for value in [value for value in graph.inputs if not value.uses()]:
        graph.inputs.remove(value)
    cache = interface.cache.model_copy(update={"layers": layers}) if interface.cache else None
    return interface.model_copy(update={"inputs": inputs, "outputs": outputs, "cache": cache})


def _is_cast(value: ir.Value) -> bool:
    return any(node.op_type == "Cast" for node in value.consumers())
