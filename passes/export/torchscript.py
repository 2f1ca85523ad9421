"""Torch to ONNX by the older exporter, which traces the model with TorchScript.

Torch has deprecated it, and much that is published was made with it. The graph stays as the exporter writes it:
hundreds of small nodes, a Constant for each number, and an Identity for each parameter whose values another has, too.

The exporter runs the model, so it needs weights. It sees the checkpoint's own, mapped; those in half precision, which
it would have to hold as float32, are stand-ins of one value each that take no memory. It writes the graph without them.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING

from passes.export.causal_lm import CausalLM, checkpoint_causal_lm, first_cause, take_tokens_alone, torch_view
from pipeline import Artifact, Interface, PipelineError

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir
    import torch

LATEST_OPSET = 20
"""The latest operator set that this exporter writes."""

BATCH, SEQUENCE = 2, 3
"""Sizes that the model is traced with; both are dynamic in the graph."""

EXACT_BYTES = 1 << 20
"""Half-precision parameters up to this size have their own values: the exporter merges those that are equal."""


def trace_with_torchscript(artifact: Artifact, opset: int, interface: Interface) -> tuple[ir.Model, Mapping[str, str]]:
    """The graph of whole passes and the checkpoint's tensor for each of its parameters.

    Parameters are initializers without values, named as in the model; computed buffers have theirs.

    Input: input_ids int64 [B, S]. Output: logits float32 [B, S, V].

    Raises: PipelineError where the exporter does not know an operator of the model, or the model's code an argument.
    """
    import onnx
    import onnx_ir as ir
    import torch

    model = checkpoint_causal_lm(artifact, _held)
    take_tokens_alone(model, positions=False)
    tokens = torch.zeros(BATCH, SEQUENCE, dtype=torch.int64)
    names = [*interface.inputs.values(), *interface.outputs.values()]
    written = io.BytesIO()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated, and takes some shapes for constants: that is checked
        try:
            torch.onnx.export(
                model.module,
                (tokens,),
                written,
                dynamo=False,
                opset_version=opset,
                export_params=False,
                do_constant_folding=False,  # it would make a transposed copy of every weight
                input_names=list(interface.inputs.values()),
                output_names=list(interface.outputs.values()),
                dynamic_axes={name: {0: "batch", 1: "sequence"} for name in names},
            )
        except Exception as error:  # the exporter raises whatever the model's code or its own does
            raise PipelineError(
                f"torch's TorchScript exporter does not support this {model.module.config.model_type!r} model: "
                f"{first_cause(error)}",
                hint="`exporter: dynamo`, the default, supports more",
            ) from error
    graph = ir.from_proto(onnx.load_from_string(written.getvalue()))
    _parameters_from_inputs(graph, model, interface)
    return graph, model.sources


def _held(array: np.ndarray, number: int) -> torch.Tensor:
    """A float32 tensor for a tensor of the checkpoint: its own values, or a stand-in that `number` tells apart."""
    import torch

    tensor = torch_view(array)
    if tensor.dtype == torch.float32:
        return tensor
    if array.nbytes <= EXACT_BYTES:
        return tensor.float()
    return torch.full((1,), 1e-6 * (number + 1)).expand(tensor.shape)


def _parameters_from_inputs(graph: ir.Model, model: CausalLM, interface: Interface) -> None:
    """Make initializers of the inputs that the exporter wrote for parameters and buffers.

    Raises: PipelineError where there is an input that is neither.
    """
    import onnx_ir as ir

    buffers = dict(model.module.named_buffers())
    known = set(interface.inputs.values())
    for value in [value for value in graph.graph.inputs if value.name not in known]:
        name = str(value.name)
        graph.graph.inputs.remove(value)
        if name in model.sources:
            graph.graph.initializers[name] = value
        elif name in buffers:
            value.const_value = ir.Tensor(buffers[name].numpy(), name=name)
            graph.graph.initializers[name] = value
        else:
            raise PipelineError(f"the exported graph has an input {name!r} that is no parameter of the model")
