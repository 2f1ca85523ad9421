"""The graph that ONNX Runtime is fastest on, from one of standard operators: attention, norms and head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from passes.graph.agreement import check_agreement, outputs_of
from passes.graph.first_layers import keep_first_layers, widened_bytes
from passes.graph.offline import open_session, session_options
from passes.graph.weights_aside import execution_of_graph, keep_used_opsets
from pipeline import (
    Artifact,
    Field,
    Interface,
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
    import numpy as np
    import onnx_ir as ir

    from passes.graph.fusion import Left, Outcome

TOLERANCE = 1e-3
"""Largest difference from the graph before, as a share of an output's standard deviation. Rounding gives 1e-5."""

LIBRARIES_BYTES = 145 * 10**6
"""Memory of the pass's process before any weight is read: Python, onnx_ir and ONNX Runtime. Measured."""

WIDENED_BYTES = 2 << 30
FIRST_LAYERS = 3
"""Weights in half precision are widened to float32 to compare, and all of them may be in memory at once. Where that is
more than WIDENED_BYTES, what the first layers put into their cache is compared."""


class FuseTransformer(Pass):
    """Fuse attention and its cache (GroupQueryAttention), and norms with additions; give only the logits asked for."""

    name, version = "fuse_transformer", 1
    accepts, produces = frozenset({"onnx"}), "onnx"
    libraries = ("onnxruntime", "onnx", "onnx-ir")

    class Params(PassParams):
        logits_to_keep: bool = Field(
            True,
            description="add an input that says of how many of the last positions logits are wanted: a prompt's next "
            "token needs those of one",
        )
        allow_partial: bool = Field(
            False,
            description="keep a graph of which only some layers, or none, have an attention that could be fused; "
            "false: the stage fails, and says which layer was not and why",
        )
        verify: bool = Field(True, description="run the graph before and after on random tokens and compare")

    def run(self, artifact: Artifact, params: Params, context: PassContext) -> Artifact:
        """Apply the rules, count what each did, compare.

        Raises: PipelineError where an attention cannot be fused and `allow_partial` is not set, the graph has none, or
        the result computes something else.
        """
        if artifact.interface.cache is None:
            raise PipelineError(
                "the graph has no key-value cache, which the fused attention is made around",
                hint="export it with `cache: true`, or leave the pass out",
            )
        if artifact.interface.max_length is None:
            raise PipelineError(
                "it is not known how many positions the model has, for which its rotary tables are made",
                hint="config.json says it as max_position_embeddings",
            )
        model = load_onnx(artifact)
        context.progress(0.1, "fusing")
        interface, outcomes = fuse(model, artifact.interface, context, keep_logits=params.logits_to_keep)
        for outcome in (outcome for outcome in outcomes if outcome.of):
            context.count_rule(outcome.rule, outcome.done, outcome.of)
            context.logger.info("%s: %d of %d", outcome.rule, outcome.done, outcome.of)
            for left in outcome.left:
                context.logger.warning("%s: %s is left as it is: %s", outcome.rule, left.node, left.reason)
        attention = next(outcome for outcome in outcomes if outcome.rule == "group_query_attention")
        if not params.allow_partial and attention.done < attention.of:
            raise PipelineError(
                f"{attention.of - attention.done} of {attention.of} attention layers cannot be fused: "
                + _summary(attention.left),
                hint="`allow_partial: true` keeps those as they are",
            )
        if not attention.of and not params.allow_partial:
            raise PipelineError(
                "the graph has no Attention operator to fuse",
                hint="export_onnx writes it at opset 23, for models whose attention torch computes with "
                "scaled_dot_product_attention; `allow_partial: true` applies the other rules alone",
            )
        if params.verify:
            context.progress(0.6, "comparing")
            # a copy, for the comparison may cut it
            _compare((load_onnx(artifact), artifact.interface), (model.clone(), interface), context)
        context.progress(0.9, "writing")
        return save_onnx(
            model, context.output, like=artifact, interface=interface, execution=execution_of_graph(artifact)
        )

    @classmethod
    def predict(cls, params: Params, model: ModelSize) -> Prediction:
        """Weights stay; a prompt gives the logits that are asked for, and the cache is extended where it lies.

        Comparing transposes each weight when it is used, and widens those in half precision to float32. Measured.
        """
        after = model.model_copy(update={"logits_to_keep": params.logits_to_keep, "cache_in_place": True})
        compared = 4 * model.largest
        if params.verify and model.linear.dtype in ("float16", "bfloat16"):
            widened = 4 * (model.linear.parameters + model.head.parameters)
            layers = model.decoder.layers if model.decoder else FIRST_LAYERS
            first = 4 * model.linear.parameters * FIRST_LAYERS // layers
            compared += widened if widened <= WIDENED_BYTES else first
        return Prediction(model=after, conversion_bytes=LIBRARIES_BYTES + (compared if params.verify else 0))


def fuse(
    model: ir.Model, interface: Interface, context: PassContext, *, keep_logits: bool
) -> tuple[Interface, list[Outcome]]:
    """Fuse what can be, in place. Returns how the graph is called now, and what each rule did."""
    from passes.graph.attention_mask import MaskInputs
    from passes.graph.attention_rule import Surroundings, group_query_attention
    from passes.graph.flat_products import flat_product, same_shape
    from passes.graph.fusion import MICROSOFT, Left, NotFusedError, Outcome, apply_rule, place_of
    from passes.graph.kept_logits import INPUT, keep_last_logits
    from passes.graph.norm_rules import Gains, fold_gain, simplified_normalization, skip_normalization
    from passes.quantize.products import add_initializer, remove_unused

    assert interface.cache is not None and interface.max_length is not None
    graph = model.graph
    by_name = {str(value.name): value for value in graph.inputs}
    missing = [role for role in ("tokens", "mask") if interface.inputs.get(role) not in by_name]
    if missing:
        raise PipelineError(f"the graph has no input for the role {' nor '.join(missing)}")

    def add(name: str, array: np.ndarray) -> ir.Value:
        return add_initializer(model, name, array, context)

    around = Surroundings(
        inputs=MaskInputs(
            tokens=by_name[interface.inputs["tokens"]],
            mask=by_name[interface.inputs["mask"]],
            positions=by_name.get(interface.inputs.get("positions", "")),
            pasts=tuple(by_name[name] for role, name in interface.inputs.items() if role.startswith("past.")),
        ),
        max_length=interface.max_length,
        opsets=dict(model.opset_imports),
        add_table=add,
    )
    outcomes = [apply_rule(rule, graph, None) for rule in (flat_product(), same_shape())]
    remove_unused(model)
    attention = apply_rule(group_query_attention(), graph, around)
    remove_unused(model)
    graph.sort()
    outside = [Left(place_of(node), reason) for node, reason in around.rotary_outside]
    turned = sum(node.attributes.get_int("do_rotary", 0) for node in graph if node.op_type == "GroupQueryAttention")
    outcomes += [attention, Outcome("rotary_inside", turned, turned + len(outside), tuple(outside))]
    gains = Gains(opsets=dict(model.opset_imports), add_tensor=add)
    for rule in (fold_gain(), skip_normalization(), simplified_normalization()):
        outcomes.append(apply_rule(rule, graph, gains))
        remove_unused(model)
    update: dict[str, object] = {}
    if keep_logits and interface.logits_to_keep is None:
        logits = interface.outputs["logits"]
        try:
            keep_last_logits(graph, logits=logits, others=[str(o.name) for o in graph.outputs if o.name != logits])
            outcomes.append(Outcome("logits_to_keep", 1, 1))
            update["logits_to_keep"] = INPUT
        except NotFusedError as refusal:
            outcomes.append(Outcome("logits_to_keep", 0, 1, (Left("the head", str(refusal)),)))
    graph.sort()
    inputs = dict(interface.inputs)
    positions = around.inputs.positions
    if positions is not None and not positions.uses():  # the operator counts them by the mask
        graph.inputs.remove(positions)
        inputs = {role: name for role, name in inputs.items() if name != positions.name}
    fused = [node for node in graph if node.op_type == "GroupQueryAttention" and node.domain == MICROSOFT]
    in_place = len(fused) == interface.cache.layers
    model.opset_imports[MICROSOFT] = 1
    keep_used_opsets(model)
    cache = interface.cache.model_copy(update={"in_place": in_place})
    return interface.model_copy(update={"inputs": inputs, "cache": cache, **update}), outcomes


def _is_new(value: ir.Value) -> bool:
    """Whether the initializer lies in the pack that is still being written."""
    return value.const_value is not None and getattr(value.const_value, "entry", value) is None


def _summary(left: Sequence[Left]) -> str:
    """Each reason once, with the layers that it holds for."""
    by_reason: dict[str, list[str]] = {}
    for item in left:
        by_reason.setdefault(item.reason, []).append(item.node)
    return "; ".join(f"{', '.join(nodes)}: {reason}" for reason, nodes in by_reason.items())


def _compare(before: tuple[ir.Model, Interface], after: tuple[ir.Model, Interface], context: PassContext) -> None:
    """Run both, one after the other, so that one session's memory is enough. Neither graph is of use afterwards.

    Raises: PipelineError where they differ by more than rounding.
    """
    cache = before[1].cache
    if cache is not None and cache.layers > FIRST_LAYERS and widened_bytes(before[0]) > WIDENED_BYTES:
        before, after = ((graph, keep_first_layers(graph, face, FIRST_LAYERS)) for graph, face in (before, after))
        context.logger.info("the weights are large in float32: the first %d layers are compared", FIRST_LAYERS)
    if any(_is_new(value) for value in after[0].graph.initializers.values()):
        context.output.pack_path()  # which flushes what was written to it
    expected, given = (outputs_of(open_session(g, session_options(context.threads)), i) for g, i in (before, after))
    check_agreement(
        expected,
        given,
        context,
        tolerance=TOLERANCE,
        what="the fused graph",
        hint="this is a fault of the pass; leave it out, and report the model's config.json",
    )
