"""ONNX Runtime's graph optimizations, done once and kept, by the levels that Optimum made known."""

from __future__ import annotations

import io
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Literal

from passes.graph.agreement import check_agreement, outputs_of
from passes.graph.half_precision import to_half_precision
from passes.graph.offline import is_folded, open_session, optimize_offline, session_options
from passes.graph.weights_aside import execution_of_graph, keep_used_opsets, lay_aside, original_of, put_back
from pipeline import (
    Artifact,
    Field,
    Interface,
    ModelSize,
    Pass,
    PassContext,
    PassParams,
    Prediction,
    Requires,
    load_onnx,
    save_onnx,
)

if TYPE_CHECKING:
    import onnx_ir as ir

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"

VALUE_BYTES = 64 * 1024
"""The fusions written in Python see initializers up to this size, gains and biases; larger ones are laid aside."""

APPROXIMATING = ("O3", "O4")

TOLERANCE = {"O1": 1e-3, "O2": 1e-3, "O3": 0.05, "O4": 0.25}
"""Largest difference from the graph before, as a share of an output's standard deviation.

Rounding in float32 gives 1e-5, a wrong graph 1 and more. What rounds activations to integers (ROUNDING) makes steps of
small differences.
"""

ROUNDING_TOLERANCE = 0.25
ROUNDING = frozenset({"DynamicQuantizeLinear", "DynamicQuantizeMatMul", "MatMulNBits", "QuantizeLinear"})

COPIES = ("MemcpyFromHost", "MemcpyToHost")

DECODER = "gpt2"
"""onnxruntime.transformers' name for the fusions of decoders, GPT-2 or not."""


class OptimizeOnnxRuntime(Pass):
    """Run ONNX Runtime's graph optimizations offline: basic (O1), with fusions (O2), fast GELU (O3), float16 (O4)."""

    name, version = "optimize_onnxruntime", 1
    accepts, produces = frozenset({"onnx"}), "onnx"
    libraries = ("onnxruntime", "onnx", "onnx-ir")

    class Params(PassParams):
        level: Literal["O1", "O2", "O3", "O4"] = Field(
            "O2",
            description="O1: ONNX Runtime's basic optimizations; O2: its extended ones, too, and the fusions of "
            "onnxruntime.transformers; O3: also GELU as a tanh polynomial; O4: also float16, for CUDA only. None bakes "
            "in what only this CPU could run: that is compile_onnxruntime",
        )
        fold_weights: bool = Field(
            False,
            description="write casts and transpositions of weights as new weights, as ONNX Runtime by itself would; "
            "false leaves the weights where they lie, and folds when the model is loaded",
        )

        def requires(self) -> Requires:
            return Requires(device="cuda", providers=(CUDA,)) if self.level == "O4" else Requires()

    @classmethod
    def predict(cls, params: Params, model: ModelSize) -> Prediction:
        """Weights stay. Comparing the graphs widens half-precision products, most of which were seen to be in memory
        at once; what others take is not known. Measured.
        """
        if model.linear.dtype not in ("float16", "bfloat16"):
            return Prediction(model=model)
        products = model.linear.parameters + model.head.parameters
        return Prediction(model=model, conversion_bytes=125 * 10**6 + 4 * products * 8 // 10)

    def run(self, artifact: Artifact, params: Params, context: PassContext) -> Artifact:
        """Basic optimizations, then the fusions in Python, then the extended optimizations; then compare.

        Raises: PipelineError where ONNX Runtime refuses the graph, or the result computes something else.
        """
        before = load_onnx(artifact)
        model = load_onnx(artifact)
        context.progress(0.1, "basic optimizations")
        model = _optimized(model, "basic", params, context)
        if params.level != "O1":
            context.progress(0.4, "transformer fusions")
            model = _fused(model, artifact, context)
            context.progress(0.5, "extended optimizations")
            model = _optimized(model, "extended", params, context)
        if params.level in APPROXIMATING:
            _approximate_gelu(model, context)
        interface = artifact.interface
        if params.level == "O4":
            context.progress(0.7, "float16")
            interface = to_half_precision(model, interface, context)
        context.progress(0.8, "comparing")
        _compare((before, artifact.interface), (model, interface), params, context)
        return save_onnx(
            model, context.output, like=artifact, interface=interface, execution=execution_of_graph(artifact)
        )


def _optimized(model: ir.Model, level: str, params: OptimizeOnnxRuntime.Params, context: PassContext) -> ir.Model:
    """The graph after ONNX Runtime's optimizers of that level."""
    import onnx_ir as ir

    original = original_of(model)
    if not params.fold_weights:
        lay_aside(model, original, lambda value: _is_stored(value) and is_folded(value))
    config = {"optimization.enable_gelu_approximation": "1"} if params.level in APPROXIMATING else {}
    with context.output.scratch() as folder:
        path = optimize_offline(
            model, folder, level=level, threads=context.threads, config=config, providers=_providers(params)
        )
        made: ir.Model = ir.load(path)
        _drop_copies(made)
        _transpose_outside(made, set(original.aside))
        put_back(made, original, context, tool="ONNX Runtime")
    keep_used_opsets(made)
    return made


def _fused(model: ir.Model, artifact: Artifact, context: PassContext) -> ir.Model:
    """The graph after the fusions that onnxruntime.transformers has for decoders."""
    import onnx_ir as ir
    from onnxruntime.transformers.optimizer import optimize_by_fusion

    config = artifact.read_json("config.json")
    heads = config.get("num_attention_heads") or config.get("n_head") or 0
    width = config.get("hidden_size") or config.get("n_embd") or 0
    original = original_of(model)
    lay_aside(model, original, lambda value: _is_stored(value) and value.const_value.nbytes > VALUE_BYTES)  # type: ignore[union-attr]
    try:
        with _quiet(), redirect_stdout(io.StringIO()):
            fused = optimize_by_fusion(ir.to_proto(model), DECODER, heads, width)
    except Exception as error:  # the library asserts and indexes its way through patterns that it does not know
        context.logger.warning("onnxruntime.transformers cannot take this graph, it is left as it is: %r", error)
        put_back(model, original, context, tool="onnxruntime.transformers")
        return model
    made: ir.Model = ir.from_proto(fused.model)
    put_back(made, original, context, tool="onnxruntime.transformers")
    keep_used_opsets(made)
    counts = Counter(node.op_type for node in made.graph)
    counts.subtract(Counter(node.op_type for node in model.graph))
    done = ", ".join(f"{count:+d} {operator}" for operator, count in sorted(counts.items()) if count)
    context.logger.info("onnxruntime.transformers: %s", done or "nothing to fuse in this graph")
    return made


def _drop_copies(model: ir.Model) -> None:
    """Take out the copies between devices: a session puts its own in, and no other tool knows the operators."""
    import onnx_ir as ir

    for node in list(model.graph):
        if node.op_type in COPIES and not node.domain:
            given, made = node.inputs[0], node.outputs[0]
            assert given is not None
            if made.is_graph_output():
                if given.is_graph_input() or given.is_initializer() or given.is_graph_output():
                    node.op_type = "Identity"
                    continue
                name, made.name = made.name, None
                given.name, given.type, given.shape = name, given.type or made.type, given.shape or made.shape
            ir.convenience.replace_all_uses_with(made, given, replace_graph_outputs=True)
            model.graph.remove(node, safe=True)


def _transpose_outside(model: ir.Model, weights: set[str]) -> None:
    """Let products that transpose their weight by themselves be MatMul and Transpose again.

    The extended optimizations make FusedMatMul of them, which other passes do not know. Nothing is lost: a transposed
    weight is folded when the model is loaded.
    """
    import onnx_ir as ir

    for node in list(model.graph):
        if node.op_type != "FusedMatMul" or (weight := node.inputs[1]) is None or not _is_weight(weight, weights):
            continue
        attributes = node.attributes
        others = attributes.keys() - {"transB", "alpha"}
        plain = attributes.get_float("alpha", 1.0) == 1.0 and not any(attributes.get_int(name, 0) for name in others)
        if not plain or not attributes.get_int("transB", 0) or weight.shape is None or len(weight.shape) != 2:
            continue
        turned = ir.node("Transpose", [weight], {"perm": [1, 0]}, name=f"{node.name}.transposed")
        turned.outputs[0].name = f"{node.outputs[0].name}.transposed"
        if weight.dtype is not None:
            turned.outputs[0].dtype = weight.dtype
        turned.outputs[0].shape = ir.Shape([weight.shape[1], weight.shape[0]])
        product = ir.node("MatMul", [node.inputs[0], turned.outputs[0]], name=node.name)
        product.metadata_props.update(node.metadata_props)
        ir.convenience.replace_nodes_and_values(
            model.graph, node, [node], [turned, product], node.outputs, product.outputs
        )


def _is_weight(value: ir.Value, weights: set[str]) -> bool:
    """Whether it is one of these, or a cast of one."""
    while (node := value.producer()) is not None and node.op_type == "Cast" and node.inputs[0] is not None:
        value = node.inputs[0]
    return value.name in weights


def _approximate_gelu(model: ir.Model, context: PassContext) -> None:
    """Let ONNX's own Gelu use the polynomial in tanh. ONNX Runtime replaces its own older operator only."""
    import onnx_ir as ir

    nodes = [node for graph in model.graphs() for node in graph if node.op_type == "Gelu" and not node.domain]
    for node in nodes:
        node.attributes["approximate"] = ir.AttrString("approximate", "tanh")
    approximate = sum(node.op_type == "FastGelu" for node in model.graph) + len(nodes)
    context.logger.info("%d GELU approximated", approximate)


def _compare(
    before: tuple[ir.Model, Interface],
    after: tuple[ir.Model, Interface],
    params: OptimizeOnnxRuntime.Params,
    context: PassContext,
) -> None:
    """Run the graph as it was and as it is, one after the other, so that one session's memory is enough.

    Raises: PipelineError where they differ by more than rounding.
    """
    if "tokens" not in before[1].inputs:
        return
    # MatMulNBits in float16 gives garbage on the CPU in a graph that runs as it stands, not in one that was optimized
    options = session_options(context.threads, "all" if params.level == "O4" else None)
    expected = outputs_of(open_session(before[0], session_options(context.threads)), before[1])
    given = outputs_of(open_session(after[0], options, providers=_providers(params)), after[1])
    rounds = any(node.op_type in ROUNDING for node in before[0].graph)
    check_agreement(
        expected,
        given,
        context,
        tolerance=ROUNDING_TOLERANCE if rounds else TOLERANCE[params.level],
        what="the optimized graph",
        hint="a lower level, such as O1, leaves out the fusions",
    )


def _providers(params: OptimizeOnnxRuntime.Params) -> tuple[str, ...]:
    return (CUDA, CPU) if params.level == "O4" else (CPU,)


def _is_stored(value: ir.Value) -> bool:
    import onnx_ir as ir

    return isinstance(value.const_value, ir.LazyTensor)


@contextmanager
def _quiet() -> Iterator[None]:
    """Within, the fusions' own log stays unseen: it speaks of shape inference that they can do without."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
