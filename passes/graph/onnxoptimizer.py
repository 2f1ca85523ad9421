"""The graph rules of the onnxoptimizer library, run on the graph without its weights."""

from __future__ import annotations

import difflib
from collections import Counter
from importlib.metadata import version
from typing import TYPE_CHECKING

from pydantic import field_validator

from passes.graph.weights_aside import execution_of_graph, keep_used_opsets, lay_aside, original_of, put_back
from pipeline import (
    Artifact,
    Example,
    Field,
    ModelSize,
    Pass,
    PassContext,
    PassParams,
    PipelineError,
    Prediction,
    load_onnx,
    save_onnx,
)

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

VALUE_BYTES = 64 * 1024
"""Initializers up to this size keep their values: shapes, axes, biases, gains. Larger ones are laid aside."""

CONVOLUTION_BYTES = 512 * 2**20
"""What convolutions and batch normalizations read keeps its values, too: rules compute with it. Up to this in all."""

UNFIT = {
    "rename_input_output": "it renames the inputs and outputs that a runner knows the graph by",
    "rewrite_input_dtype": "it changes the data types of the inputs that a runner knows the graph by",
    "split_init": "it keeps only the part of the graph that no input reaches",
    "split_predict": "it drops the part of the graph that no input reaches, and makes inputs of its results",
    "lift_lexical_references": "it writes attributes that ONNX does not have",
}
"""Rules that would leave no graph that a runner can use."""

NEEDS_VALUES = {
    "eliminate_duplicate_initializer": "initializers above 64 KB are not compared",
    "fuse_qkv": "it joins three weights only where each is at most 64 KB",
    "eliminate_nop_with_unit": "an addend or factor above 64 KB is not examined",
    "adjust_add": "an addend above 64 KB does not count as constant",
    "adjust_slice_and_matmul": "a weight above 64 KB does not count as constant",
}
"""Rules that would have to see weights, and what they leave undone."""

CLEAN_UP = "eliminate_deadend"
"""Runs last: rules leave the nodes that they replaced."""

ROUNDS = 20
"""How often a list of rules is run at most until it changes nothing."""

# fmt: off
RULES_OF = {"0.4.2": (
    "adjust_add", "adjust_slice_and_matmul", "eliminate_common_subexpression", "eliminate_consecutive_idempotent_ops",
    "eliminate_deadend", "eliminate_duplicate_initializer", "eliminate_identity", "eliminate_if_with_const_cond",
    "eliminate_nop_cast", "eliminate_nop_concat", "eliminate_nop_dropout", "eliminate_nop_expand",
    "eliminate_nop_flatten", "eliminate_nop_monotone_argmax", "eliminate_nop_pad", "eliminate_nop_reshape",
    "eliminate_nop_split", "eliminate_nop_transpose", "eliminate_nop_with_unit", "eliminate_shape_gather",
    "eliminate_shape_op", "eliminate_slice_after_shape", "eliminate_unused_initializer",
    "extract_constant_to_initializer", "fuse_add_bias_into_conv", "fuse_bn_into_conv", "fuse_concat_into_reshape",
    "fuse_consecutive_concats", "fuse_consecutive_log_softmax", "fuse_consecutive_reduce_unsqueeze",
    "fuse_consecutive_slices", "fuse_consecutive_squeezes", "fuse_consecutive_transposes",
    "fuse_consecutive_unsqueezes", "fuse_matmul_add_bias_into_gemm", "fuse_pad_into_conv", "fuse_pad_into_pool",
    "fuse_qkv", "fuse_transpose_into_gemm", "lift_lexical_references", "nop", "rename_input_output",
    "replace_einsum_with_matmul", "rewrite_input_dtype", "rewrite_where", "set_unique_name_for_nodes", "split_init",
    "split_predict",
)}
# fmt: on
"""Rules by the library's version, so that a plan knows a wrong name without the library. Others the worker checks."""


class OnnxOptimizer(Pass):
    """Simplify the graph with onnxoptimizer's rules: drop what does nothing, fuse what follows on each other."""

    name, version = "onnxoptimizer", 1
    accepts, produces = frozenset({"onnx"}), "onnx"
    libraries = ("onnxoptimizer", "onnx", "onnx-ir")
    examples = (Example(others={"passes": ["fuse_consecutive_unsqueezes"]}),)

    class Params(PassParams):
        passes: list[str] | None = Field(
            None,
            description="names of onnxoptimizer's rules, run in this order; by default the library's own set of all "
            "its fusions and eliminations. eliminate_deadend follows in any case, as rules leave behind what they "
            "replaced. Weights above 64 KB stay outside: eliminate_duplicate_initializer and "
            "fuse_qkv do nothing to them",
        )
        fixed_point: bool = Field(False, description="run the rules again until they change nothing")

        @field_validator("passes")
        @classmethod
        def _known(cls, passes: list[str] | None) -> list[str] | None:
            if passes is not None and not passes:
                raise ValueError("the list is empty; leave `passes` out for the library's own set")
            check_rules(passes or [], RULES_OF.get(version("onnxoptimizer"), ()))
            return passes

    @classmethod
    def predict(cls, params: Params, model: ModelSize) -> Prediction:
        """Weights are set aside while the graph is rewritten. Memory as measured: it does not grow with them."""
        return Prediction(model=model, conversion_bytes=80 * 10**6)

    def run(self, artifact: Artifact, params: Params, context: PassContext) -> Artifact:
        """Lay the weights aside, run the rules, put the weights back.

        Raises: PipelineError where the installed library has no rule of a name, or it refuses the graph.
        """
        import onnx_ir as ir
        import onnxoptimizer

        rules = params.passes or [rule for rule in onnxoptimizer.get_fuse_and_elimination_passes() if rule not in UNFIT]
        try:
            check_rules(rules, onnxoptimizer.get_available_passes())
        except ValueError as error:
            raise PipelineError(f"onnxoptimizer {version('onnxoptimizer')}: {error}") from None
        model = load_onnx(artifact)
        before = Counter(node.op_type for node in model.graph.all_nodes())
        original = original_of(model)
        read_by_convolutions = _read_by_convolutions(model) if _computes_with_weights(rules) else set()
        lay_aside(model, original, lambda value: value not in read_by_convolutions and not _keeps_its_value(value))
        for rule in rules:
            if rule in NEEDS_VALUES and original.aside:
                context.logger.info("%s: %s", rule, NEEDS_VALUES[rule])
        context.progress(0.2, f"{len(rules)} rules")
        made = ir.from_proto(_applied(ir.to_proto(model), rules, context, rounds=ROUNDS if params.fixed_point else 1))
        put_back(made, original, context, tool="onnxoptimizer")
        keep_used_opsets(made)
        after = Counter(node.op_type for node in made.graph.all_nodes())
        context.logger.info("%d nodes became %d", before.total(), after.total())
        return save_onnx(made, context.output, like=artifact, execution=execution_of_graph(artifact))


def _applied(proto: onnx.ModelProto, rules: list[str], context: PassContext, *, rounds: int) -> onnx.ModelProto:
    """The graph after the rules, one by one, and again up to `rounds` times in all, as long as they change something.

    How many nodes each rule changed is found by comparing the graph before and after it, and counted. The library's own
    fixed point repeats single rules, not the list: what a later rule opens to an earlier one stays.

    Raises: PipelineError where the library refuses the graph.
    """
    for _ in range(rounds):
        began = proto
        for rule in [*rules, CLEAN_UP]:
            done = _optimized(proto, rule, repeated=rounds > 1)
            changed = changed_nodes(proto.graph, done.graph)
            if rule in rules or changed:
                context.count_rule(rule, changed, len(proto.graph.node))
            proto = done
        if proto.graph.node == began.graph.node:
            break
    return proto


def _optimized(proto: onnx.ModelProto, rule: str, *, repeated: bool) -> onnx.ModelProto:
    import onnxoptimizer

    try:
        done: onnx.ModelProto = onnxoptimizer.optimize(proto, [rule], repeated)
    except RuntimeError as error:  # what the library raises for graphs that it cannot hold
        raise PipelineError(f"onnxoptimizer cannot take this graph: {_first_line(error)}") from error
    return done


def changed_nodes(before: onnx.GraphProto, after: onnx.GraphProto) -> int:
    """Nodes that a rule removed, replaced or changed; where there are none, those that take other values than before.

    Names of nodes play no part. Consumers of a removed node take another value, but nothing was done to them.
    """
    gone = _signatures(before, wiring=False) - _signatures(after, wiring=False)
    return gone.total() or (_signatures(before, wiring=True) - _signatures(after, wiring=True)).total()


def _signatures(graph: onnx.GraphProto, *, wiring: bool) -> Counter[bytes]:
    """Nodes by operator and attributes, and with `wiring` by the names of the values that they take and give."""
    found: Counter[bytes] = Counter()
    for node in graph.node:
        signature = type(node)()
        signature.CopyFrom(node)
        signature.ClearField("name")
        signature.ClearField("doc_string")
        signature.ClearField("metadata_props")
        if not wiring:
            del signature.input[:], signature.output[:]
        attributes = sorted(signature.attribute, key=lambda attribute: attribute.name)
        del signature.attribute[:]
        signature.attribute.extend(attributes)
        found[signature.SerializeToString(deterministic=True)] += 1
    return found


def check_rules(rules: list[str], known: tuple[str, ...] | list[str]) -> None:
    """Raises: ValueError for a rule that is not among `known`, where any are, or that would spoil the graph."""
    for rule in rules:
        if rule in UNFIT:
            raise ValueError(f"the rule {rule!r} cannot be used here: {UNFIT[rule]}")
        if known and rule not in known:
            near = difflib.get_close_matches(rule, known, n=1, cutoff=0)
            raise ValueError(f"there is no rule {rule!r}; the nearest of {len(known)} is {near[0]!r}")


def _keeps_its_value(value: ir.Value) -> bool:
    """Whether it is small, and of a data type that the library can hold."""
    import onnx_ir as ir

    tensor = value.const_value
    assert tensor is not None
    held = tensor.dtype == ir.DataType.STRING or (tensor.dtype.bitwidth >= 8 and "FLOAT8" not in tensor.dtype.name)
    return held and tensor.nbytes <= VALUE_BYTES


def _computes_with_weights(rules: list[str]) -> bool:
    return bool({"fuse_bn_into_conv", "fuse_add_bias_into_conv"} & set(rules))


def _read_by_convolutions(model: ir.Model) -> set[ir.Value]:
    """The initializers of convolutions and batch normalizations, as many as CONVOLUTION_BYTES hold."""
    chosen: set[ir.Value] = set()
    room = CONVOLUTION_BYTES
    for node in model.graph:
        if node.domain or node.op_type not in ("Conv", "BatchNormalization"):
            continue
        for value in node.inputs[1:]:
            if value is not None and value.const_value is not None and value not in chosen:
                room -= value.const_value.nbytes
                if room >= 0:
                    chosen.add(value)
    return chosen


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
