"""Torch to ONNX by tracing with shapes alone: the graph is made without the weights, and then refers to them.

The exporter sees parameters that have shapes and no bytes, so the memory and time that an export takes do not grow with
the weights. Each parameter of the traced graph becomes an initializer that names the checkpoint's own bytes.
"""

from __future__ import annotations

import logging
import re
import types
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from pydantic import model_validator

from passes.export.causal_lm import (
    CausalLM,
    causal_lm_config,
    first_cause,
    refused_operator,
    take_tokens_alone,
    traced_causal_lm,
)
from passes.export.quick_decomposition import by_looking
from passes.export.quick_matching import first_node_first
from passes.export.torchscript import LATEST_OPSET, trace_with_torchscript
from passes.export.verify import FIRST_LAYERS, WIDENED_BYTES, verify_against_torch
from pipeline import (
    Artifact,
    CacheLayout,
    Example,
    Field,
    Interface,
    ModelSize,
    Pass,
    PassContext,
    PassParams,
    PipelineError,
    Prediction,
    referenced_tensor,
    save_onnx,
)

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

logger = logging.getLogger("pipeline.pass.export_onnx")

KEPT_METADATA = ("pkg.torch.onnx.class_hierarchy", "pkg.torch.onnx.name_scopes")
"""What stays of the exporter's notes on a node: the modules it comes from. The rest names files of this machine."""

BATCH, SEQUENCE, PAST = 2, 3, 5
"""Sizes that the graph is traced with; all are dynamic, and none is 0 or 1, which torch.export takes for constants."""

STORED_DTYPES = ("float32", "float16", "bfloat16")

TRACING_BYTES = 415 * 10**6
TRACING_BYTES_PER_LAYER = 4_500_000
"""Memory of the process that exports: its libraries, and what the graph of a layer takes. Measured."""

TORCHSCRIPT_BYTES = 310 * 10**6
"""What the older exporter takes beyond that; it was the same for models of 275 and 560 MB."""


class ExportOnnx(Pass):
    """Export a causal language model to ONNX, with a key-value cache or without, without copying its weights."""

    name, version = "export_onnx", 2
    accepts, produces = frozenset({"torch"}), "onnx"
    libraries = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime")
    examples = (Example(params={"verify": False}), Example())

    class Params(PassParams):
        opset: int = Field(
            23,
            ge=18,
            le=23,
            description="ONNX operator set: 18 is the oldest that the exporter writes; 23 the first with Attention, "
            "RotaryEmbedding and RMSNormalization, without which a graph is hundreds of small nodes",
        )
        cache: bool = Field(
            True,
            description="the graph takes and gives a key-value cache; false: it takes whole sequences of tokens and "
            "gives their logits, which evaluate.workload.forward measures",
        )
        exporter: Literal["dynamo", "torchscript"] = Field(
            "dynamo",
            description="torchscript: torch's older exporter, deprecated there, which wrote much that is published. "
            "Only with `cache: false`; up to opset 20, its default; its graph is left as it is, not simplified",
        )
        verify: bool = Field(True, description="run the graph and the torch model on random tokens and compare")
        tolerance: float = Field(
            1e-3,
            gt=0,
            description="largest difference from torch that passes, as a share of the output's standard deviation; "
            "rounding in float32 gives about 1e-5, a wrong graph 0.1 and more",
        )

        @model_validator(mode="before")
        @classmethod
        def _opset_of_torchscript(cls, given: Any) -> Any:
            if isinstance(given, dict) and given.get("exporter") == "torchscript":
                return {"opset": LATEST_OPSET, **given}
            return given

        @model_validator(mode="after")
        def _what_torchscript_can(self) -> ExportOnnx.Params:
            if self.exporter == "torchscript":
                if self.cache:
                    raise ValueError("the torchscript exporter writes graphs without a cache only: add `cache: false`")
                if self.opset > LATEST_OPSET:
                    raise ValueError(f"the torchscript exporter writes opset {LATEST_OPSET} at most, not {self.opset}")
            return self

    def run(self, artifact: Artifact, params: Params, context: PassContext) -> Artifact:
        """Trace, simplify, refer to the checkpoint, verify.

        Raises: PipelineError where the model is no causal language model with a plain key-value cache, the exporter
        does not support it, or the graph differs from torch.
        """
        if artifact.manifest.transforms:
            names = ", ".join(str(t.get("transform", t)) for t in artifact.manifest.transforms)
            raise PipelineError(f"a torch model with transforms cannot be exported: {names}")
        context.progress(0.0, "tracing")
        if params.exporter == "torchscript":
            interface = _whole_passes(artifact)
            model, sources = trace_with_torchscript(artifact, params.opset, interface)
        else:
            model, interface, sources = trace(artifact, params.opset, cache=params.cache)
            context.progress(0.5, "simplifying")
            simplify(model)
            number_anew(model, keep=sources)
        refer_to_checkpoint(model, sources, artifact)
        strip_metadata(model)
        if params.verify:
            context.progress(0.6, "comparing with torch")
            verify_against_torch(model, artifact, interface, tolerance=params.tolerance, context=context)
        context.progress(0.95, "writing")
        return save_onnx(model, context.output, like=artifact, interface=interface, execution={})

    @classmethod
    def predict(cls, params: Params, model: ModelSize) -> Prediction:
        """Weights stay as they are stored, products are in float32, and no graph limits its logits.

        Comparing with torch widens half-precision weights to float32, of which the head and a matrix of each layer's
        MLP were seen to be in memory at once. Of large models the first layers are compared, without the head.
        """
        after = model.model_copy(
            update={"format": "onnx", "dtype": "float32", "logits_to_keep": False, "has_cache": params.cache}
        )
        decoder = model.decoder
        memory = TRACING_BYTES + TRACING_BYTES_PER_LAYER * (decoder.layers if decoder else 0)
        if params.exporter == "torchscript":
            memory += TORCHSCRIPT_BYTES
        if params.verify and decoder and model.linear.dtype in ("float16", "bfloat16"):
            whole = 4 * (model.linear.parameters + model.head.parameters) <= WIDENED_BYTES or not params.cache
            layers, head = (decoder.layers, model.head.parameters) if whole else (FIRST_LAYERS, 0)
            memory += 4 * (head + layers * decoder.hidden * decoder.intermediate)
        return Prediction(model=after, conversion_bytes=memory)


def trace(artifact: Artifact, opset: int, *, cache: bool = True) -> tuple[ir.Model, Interface, Mapping[str, str]]:
    """The traced graph, its interface, and the checkpoint's tensor for each of its parameters.

    Parameters are initializers without values, named as in the model; computed buffers have theirs.

    Inputs: input_ids, position_ids int64 [B, S]; attention_mask int64 [B, past + S], 1 for what may be attended to;
    past_key_values.{i}.key and .value float32 [B, kv_heads, past, head_dim].
    Outputs: logits float32 [B, S, V]; present.{i}.key and .value float32 [B, kv_heads, past + S, head_dim].
    Without a cache: input_ids alone, and logits alone.

    Raises: PipelineError where the architecture cannot be traced or written as ONNX.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    config = causal_lm_config(artifact)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    model = traced_causal_lm(artifact, mode)
    with mode, torch.no_grad():
        if cache:
            layout = _cache_layout(model)
            interface = _interface(layout, artifact.interface, config.get_text_config())
            arguments, dimensions = _example(layout)
            _flatten_signature(model)
        else:
            interface = _whole_passes(artifact)
            arguments = (torch.zeros(BATCH, SEQUENCE, dtype=torch.int64),)
            dimensions = ({0: "batch", 1: "sequence"},)
            take_tokens_alone(model, positions=True)
        with _quiet():
            try:
                program = _exported(
                    model.module,
                    arguments,
                    opset_version=opset,
                    input_names=list(interface.inputs.values()),
                    output_names=list(interface.outputs.values()),
                    dynamic_shapes=dimensions,
                )
            except Exception as error:  # the exporter raises whatever the model's code or its own does
                operator = refused_operator(error)
                where = f"the operator {operator}: " if operator else ""
                raise PipelineError(
                    f"torch's ONNX exporter does not support this {config.model_type!r} model: "
                    f"{where}{first_cause(error)}",
                    hint="a newer torch may support it" if operator else None,
                ) from error
    graph: ir.Model = program.model
    _release_fakes(graph, model.sources)
    _name_dimensions(graph, interface)
    return graph, interface, model.sources


def _exported(module: torch.nn.Module, arguments: tuple[Any, ...], **options: Any) -> torch.onnx.ONNXProgram:
    """What torch.onnx.export gives, sooner where that can be had. Raises whatever it does."""
    import torch

    fixed = {"dynamo": True, "optimize": False, "verbose": False}
    with by_looking() as looking:
        try:
            return torch.onnx.export(module, arguments, **fixed, **options)
        except Exception as error:
            if not looking.taken_apart:
                raise
            logger.info("exported again, all of it by torch: %s", first_cause(error))
    return torch.onnx.export(module, arguments, **fixed, **options)


def simplify(model: ir.Model) -> None:
    """Fold what is constant and use the fused operators that opset 23 has.

    The parameters are inputs of the graph meanwhile: values that nothing may fold, merge or read.
    """
    from onnx_ir.passes.common import CommonSubexpressionEliminationPass
    from onnxscript.optimizer import optimize_ir
    from onnxscript.rewriter.onnx_fusions import fuse

    graph = model.graph
    parameters = [value for value in graph.initializers.values() if value.const_value is None]
    for value in parameters:
        del graph.initializers[str(value.name)]
        graph.inputs.append(value)
    with _quiet(), first_node_first():
        optimize_ir(model)
        fuse(model)
        CommonSubexpressionEliminationPass()(model)  # the fusions leave a Cos and a Sin for every use
    del graph.inputs[len(graph.inputs) - len(parameters) :]
    for value in parameters:
        if value.uses():
            graph.initializers[str(value.name)] = value


def refer_to_checkpoint(model: ir.Model, sources: Mapping[str, str], artifact: Artifact) -> None:
    """Give each initializer without a value the checkpoint's bytes.

    Weights in half precision keep it and are cast to float32 where they are used, embeddings after the lookup.
    """
    part = artifact.component
    for name, value in model.graph.initializers.items():
        if value.const_value is not None:
            continue
        ref = part.tensors[sources[name]]
        if ref.dtype not in STORED_DTYPES:
            raise PipelineError(
                f"the checkpoint's {sources[name]!r} is {ref.dtype}; export_onnx takes {', '.join(STORED_DTYPES)}"
            )
        entry = part.files[ref.file]
        value.const_value = referenced_tensor(name, artifact.locate(entry), ref, entry)
        if value.dtype != value.const_value.dtype:
            _store_as(value, value.const_value.dtype, model.graph)
    _weights_first(model.graph)


def number_anew(model: ir.Model, keep: Collection[str]) -> None:
    """Number what torch numbered (`val_84`, `node_Transpose_84`) in the order of the graph that is left.

    torch counts what it traced, of which much is folded away, and how much that was depends on the libraries that are
    loaded beside it: the same graph would be other bytes. What keeps its name: inputs and outputs, and initializers in
    `keep`, whose names are the model's.
    """
    outer = model.graph
    fixed = {value for graph in model.graphs() for value in [*graph.inputs, *graph.outputs]}
    fixed |= {value for name, value in outer.initializers.items() if name in keep}
    taken = {value.name for value in fixed}
    initializers = list(outer.initializers.values())
    outer.initializers.clear()  # a renamed one would go to the end, one whose number is right already would not

    counts: Counter[str] = Counter()

    def numbered(name: str) -> str:
        kind = re.sub(r"_\d+$", "", name)
        while True:
            found = f"{kind}_{counts[kind]}" if counts[kind] else kind
            counts[kind] += 1
            if found not in taken:
                taken.add(found)
                return found

    nodes = [node for graph in model.graphs() for node in graph]
    values = [*initializers, *(value for node in nodes for value in node.outputs)]
    for value in values:
        if value not in fixed and value.name:
            value.name = numbered(value.name)
    for value in initializers:
        outer.initializers[str(value.name)] = value
    counts.clear()
    taken.clear()
    for node in nodes:
        node.name = numbered(node.name or node.op_type)


def strip_metadata(model: ir.Model) -> None:
    """Remove what differs between machines (stack traces with paths) from the graph; module scopes stay."""
    model.metadata_props.clear()
    for graph in model.graphs():
        graph.metadata_props.clear()
        graph.doc_string = None
        for value in [*graph.inputs, *graph.initializers.values()]:
            value.metadata_props.clear()
            value.doc_string = None
        for node in graph:
            node.doc_string = None
            for key in node.metadata_props.keys() - set(KEPT_METADATA):
                del node.metadata_props[key]
            for value in node.outputs:
                value.metadata_props.clear()
                value.doc_string = None


def _store_as(value: ir.Value, dtype: ir.DataType, graph: ir.Graph) -> None:
    """Let the initializer have another data type, and cast it back for its users."""
    import onnx_ir as ir

    assert value.dtype is not None
    computed, value.dtype = value.dtype, dtype

    def cast(stored: ir.Value, users: Sequence[tuple[ir.Node, int]]) -> None:
        first = min((user for user, _ in users), key=graph.index)
        node = ir.node("Cast", [stored], {"to": computed}, name=f"{stored.name}.cast")
        node.metadata_props.update(first.metadata_props)
        node.outputs[0].name = f"{stored.name}.{computed.numpy().name}"
        node.outputs[0].dtype, node.outputs[0].shape = computed, stored.shape
        graph.insert_before(first, node)
        for user, index in users:
            user.replace_input_with(index, node.outputs[0])

    lookups = [use for use in value.uses() if use.node.op_type == "Gather" and use.idx == 0]
    for lookup, _ in lookups:
        lookup.outputs[0].dtype = dtype
        cast(lookup.outputs[0], list(lookup.outputs[0].uses()))
    if others := [use for use in value.uses() if use not in lookups]:
        cast(value, others)


def _weights_first(graph: ir.Graph) -> None:
    """Move what is computed from weights alone to the graph's beginning.

    ONNX Runtime orders nodes from the outputs back and takes the later of a node's inputs first: a cast that stands
    right before its product would run before all layers, and all weights would be in memory at once. One that stands
    at the beginning runs last, right before its product.
    """
    moved: set[ir.Node | None] = set()
    for node in list(graph):
        source = node.inputs[0] if node.op_type in ("Cast", "Transpose") else None
        if source is not None and (source.is_initializer() or source.producer() in moved):
            moved.add(node)
    front = [node for node in graph if node in moved]
    graph.remove(front)
    graph.insert_before(graph[0], front)


def _cache_layout(model: CausalLM) -> CacheLayout:
    """The key-value cache that the model fills, seen by running it on shapes alone, within its fake mode.

    Raises: PipelineError where it keeps none, or one that is not the same keys and values [B, heads, T, size] in all
    layers.
    """
    import torch
    from transformers import DynamicCache

    tokens = torch.zeros(BATCH, SEQUENCE, dtype=torch.int64)
    try:
        result = model.module(input_ids=tokens, past_key_values=DynamicCache(), use_cache=True)
    except Exception as error:  # the model's own code, on shapes alone
        raise PipelineError(f"the model cannot be traced without its weights: {first_cause(error)}") from error
    layers = getattr(getattr(result, "past_key_values", None), "layers", [])
    shapes = {
        tuple(tensor.shape) for layer in layers if hasattr(layer, "keys") for tensor in (layer.keys, layer.values)
    }
    if len(shapes) != 1:
        raise PipelineError(
            "export_onnx needs a cache with keys and values of one shape in all layers; this model's has "
            + (", ".join(str(list(shape)) for shape in sorted(shapes)) or "none")
        )
    _, heads, length, size = shapes.pop()
    if length != SEQUENCE:
        raise PipelineError(f"the model's cache holds {length} positions after {SEQUENCE} tokens")
    return CacheLayout(layers=len(layers), kv_heads=heads, head_dim=size)


def _interface(cache: CacheLayout, given: Interface, config: Any) -> Interface:
    inputs = {"tokens": "input_ids", "mask": "attention_mask", "positions": "position_ids"}
    outputs = {"logits": "logits"}
    for layer in range(cache.layers):
        for short, long in (("k", "key"), ("v", "value")):
            inputs[f"past.{short}[{layer}]"] = f"past_key_values.{layer}.{long}"
            outputs[f"present.{short}[{layer}]"] = f"present.{layer}.{long}"
    return Interface(
        task="causal-lm",
        inputs=inputs,
        outputs=outputs,
        cache=cache,
        vocab_size=given.vocab_size or config.vocab_size,
        max_length=given.max_length or getattr(config, "max_position_embeddings", None),
    )


def _whole_passes(artifact: Artifact) -> Interface:
    """The interface of a graph without a cache."""
    given, config = artifact.interface, causal_lm_config(artifact).get_text_config()
    return Interface(
        task="causal-lm",
        inputs={"tokens": "input_ids"},
        outputs={"logits": "logits"},
        vocab_size=given.vocab_size or config.vocab_size,
        max_length=given.max_length or getattr(config, "max_position_embeddings", None),
    )


def _example(cache: CacheLayout) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Arguments to trace with, in the order of the flattened signature, and the names of their dynamic dimensions."""
    import torch

    tokens = torch.zeros(BATCH, SEQUENCE, dtype=torch.int64)
    mask = torch.ones(BATCH, PAST + SEQUENCE, dtype=torch.int64)
    past = [torch.zeros(BATCH, cache.kv_heads, PAST, cache.head_dim) for _ in range(2 * cache.layers)]
    per_token = {0: "batch", 1: "sequence"}
    dimensions = (per_token, {0: "batch", 1: "total"}, per_token, [{0: "batch", 2: "past"} for _ in past])
    return (tokens, mask, tokens.clone(), past), dimensions


def _flatten_signature(model: CausalLM) -> None:
    """Have the module take and return plain tensors: tokens, mask, positions, [key, value, key, …]."""
    from transformers import DynamicCache

    original = type(model.module).forward
    takes_positions = model.takes_positions

    def forward(
        self: torch.nn.Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: list[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        positions = {"position_ids": position_ids} if takes_positions else {}
        cache = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
        result = original(
            self, input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True, **positions
        )
        present = [tensor for layer in result.past_key_values.layers for tensor in (layer.keys, layer.values)]
        return result.logits, *present

    model.module.forward = types.MethodType(forward, model.module)


def _release_fakes(model: ir.Model, sources: Mapping[str, str]) -> None:
    """Parameters lose their fake values; other initializers get arrays of their own.

    Raises: PipelineError where a computed buffer has no value either.
    """
    import numpy as np
    import onnx_ir as ir

    for name, value in model.graph.initializers.items():
        if name in sources:
            value.const_value = None
            continue
        assert value.const_value is not None
        try:
            array = np.array(value.const_value.numpy())
        except Exception as error:  # torch refuses in several ways to give bytes that are not there
            raise PipelineError(
                f"the model computes the constant {name!r} from its weights: {first_cause(error)}"
            ) from error
        value.const_value = ir.Tensor(array, name=name)


def _name_dimensions(model: ir.Model, interface: Interface) -> None:
    """Say the outputs' dynamic dimensions in the inputs' terms, in one spelling."""
    import onnx_ir as ir

    present = {name for role, name in interface.outputs.items() if role.startswith("present")}
    for value in model.graph.outputs:
        assert value.shape is not None
        if value.name in present:
            value.shape = ir.Shape(["batch", value.shape[1], "past + sequence", value.shape[3]])


@contextmanager
def _quiet() -> Iterator[None]:
    """Within, the exporter's own warnings and log stay unseen: they speak of its workings, not of the model."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
