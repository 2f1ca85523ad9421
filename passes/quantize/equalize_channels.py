"""Channels of a norm's output and of the weights that read them, made alike in size before both are rounded.

A norm multiplies channel k by its gain g[k], and the products behind it multiply that by the column W[:, k]. To divide
the one by s[k] and multiply the other by it changes nothing. Where a few channels are tens of times as large as the
others, rounding activations to 8 bits leaves the others few steps, and rounding a block of weights leaves the small
columns behind the large channels none. s[k] = |g[k]|^a / max|W[:, k]|^(1 - a) brings both nearer to each other, as in
SmoothQuant (arXiv 2211.10438), which takes activations seen on a text where this takes the norm's gains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from passes.graph.weights_aside import execution_of_graph
from passes.quantize.block_quantization import for_each
from passes.quantize.products import Product, add_initializer, find_products, remove_unused
from pipeline import (
    Artifact,
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
    import numpy as np
    import onnx_ir as ir

GAINS = {
    "RMSNormalization": (1,),
    "SimplifiedLayerNormalization": (1,),
    "LayerNormalization": (1, 2),
    "SkipSimplifiedLayerNormalization": (2,),
    "SkipLayerNormalization": (2, 3),
}
"""Operator -> which of its inputs multiply or shift channels: the gain first."""

CHUNK_VALUES = 1 << 18
"""Weights read at a time by a thread."""


class EqualizeChannels(Pass):
    """Move outlier channels out of norms' outputs into the weights that read them, to round both with less error."""

    name, version = "equalize_channels", 1
    accepts, produces = frozenset({"onnx"}), "onnx"
    libraries = ("numpy", "onnx", "onnx-ir")
    comes_before = dict.fromkeys(
        ("quantize_weights", "quantize_dynamic", "quantize_static"),
        "it scales float weights, so that quantizing them loses less",
    )

    class Params(PassParams):
        strength: float = Field(
            0.5,
            ge=0,
            le=1,
            description="how much of a channel's size moves from the activations to the weights: 0 makes the weights' "
            "columns alike, 1 the activations' channels",
        )

    @classmethod
    def predict(cls, params: Params, model: ModelSize) -> Prediction:
        """Weights stay where they lie, and are read one at a time."""
        return Prediction(model=model, conversion_bytes=80 * 10**6)

    def run(self, artifact: Artifact, params: Params, context: PassContext) -> Artifact:
        """Scale every norm whose output constant products alone read.

        Raises: PipelineError where there is none, or a weight holds values that are not finite.
        """
        model = load_onnx(artifact)
        norms = [node for node in model.graph if node.op_type in GAINS]
        by_node = {product.node: product for product in find_products(model)}
        done = 0
        for count, norm in enumerate(norms):
            context.progress(count / len(norms), str(norm.name))
            readers = _readers(norm, by_node)
            if isinstance(readers, str):
                context.logger.info("%s is left as it is: %s", norm.name, readers)
                continue
            _equalize(norm, readers, model, params.strength, context)
            done += 1
        if not done:
            raise PipelineError(
                "no norm of this graph is read by products with constant weights alone: there is nothing to equalize",
                hint="the pass belongs between the export (or fuse_transformer) and the quantization",
            )
        remove_unused(model)
        context.count_rule("equalize_channels", done, len(norms))
        return save_onnx(model, context.output, like=artifact, execution=execution_of_graph(artifact))


@dataclass(frozen=True)
class Reader:
    """A product that reads a norm's output: where in the graph its weight is scaled."""

    product: Product
    operand: ir.Value
    """What the product multiplies by, [K, N]."""


def _readers(norm: ir.Node, by_node: dict[ir.Node, Product]) -> list[Reader] | str:
    """The products behind a norm, or why it is left."""
    output = norm.outputs[0]
    users = output.consumers()
    gains = [norm.inputs[index] for index in GAINS[norm.op_type] if index < len(norm.inputs)]
    others = sorted({user.op_type for user in users if user not in by_node or user.inputs[0] is not output})
    products = [by_node[user] for user in users if user in by_node]
    reasons = {
        "no product reads it": not users or output.is_graph_output(),
        "its gain is computed: fuse_transformer folds it": any(g is not None and g.const_value is None for g in gains),
        f"{', '.join(others)} reads it, too": bool(others),
        "its channels are equalized already": any(product.scale is not None for product in products),
        "a Gemm reads it": any(product.node.op_type != "MatMul" for product in products),
        "it is not computed in float32": output.dtype is not None and output.dtype.bitwidth != 32,
    }
    if found := [reason for reason, holds in reasons.items() if holds]:
        return found[0]
    return [Reader(product, product.node.inputs[1]) for product in products if product.node.inputs[1] is not None]


def _equalize(norm: ir.Node, readers: Sequence[Reader], model: ir.Model, strength: float, context: PassContext) -> None:
    import numpy as np

    inputs = [index for index in GAINS[norm.op_type] if index < len(norm.inputs) and norm.inputs[index] is not None]
    gain = norm.inputs[inputs[0]]
    assert gain is not None and gain.const_value is not None
    values = np.asarray(gain.const_value.numpy(), np.float32)
    columns = np.max([_largest(reader.product, context.threads) for reader in readers], axis=0)
    if not np.isfinite(columns).all():
        raise PipelineError(f"a weight behind {norm.name} holds values that are not finite")
    factors = scales(np.abs(values), columns, strength)
    for index in inputs:
        before = norm.inputs[index]
        assert before is not None and before.const_value is not None
        scaled = (np.asarray(before.const_value.numpy(), np.float32) / factors).astype(before.const_value.dtype.numpy())
        norm.replace_input_with(index, add_initializer(model, f"{before.name}.equalized", scaled, context))
    along_rows = add_initializer(model, f"{gain.name}.scale", factors, context)
    along_columns: ir.Value | None = None
    seen: dict[ir.Value, ir.Value] = {}
    for reader in readers:
        product, operand = reader.product, reader.operand
        if operand not in seen:
            if product.transposed:  # [N, K], transposed on the way: scaled before that
                seen[operand] = _scaled_before_transposition(operand, along_rows)
            else:
                if along_columns is None:
                    along_columns = add_initializer(model, f"{gain.name}.scale_rows", factors[:, None], context)
                seen[operand] = _times(operand, along_columns, operand.producer() or product.node)
        product.node.replace_input_with(1, seen[operand])


def scales(activations: np.ndarray, weights: np.ndarray, strength: float) -> np.ndarray:
    """Factors float32 [K] for channels with these largest magnitudes [K]; 1 where either is 0, their mean about 1."""
    import numpy as np

    usable = (activations > 0) & (weights > 0)
    factors = np.ones_like(activations, np.float32)
    logs = strength * np.log(activations[usable]) - (1 - strength) * np.log(weights[usable])
    factors[usable] = np.exp(logs - logs.mean()) if usable.any() else 1.0
    return factors


def _largest(product: Product, threads: int) -> np.ndarray:
    """The largest magnitude in each column [K] of a weight [N, K]."""
    import numpy as np

    matrix = product.matrix()
    rows, columns = matrix.shape
    step = max(1, CHUNK_VALUES // columns)
    starts = range(0, rows, step)
    found = np.empty((len(starts), columns), np.float32)

    def chunk(start: int) -> None:
        found[start // step] = np.abs(np.asarray(matrix[start : start + step], np.float32)).max(axis=0)

    for_each(chunk, starts, threads)
    return found.max(axis=0)  # type: ignore[no-any-return]


def _scaled_before_transposition(operand: ir.Value, factors: ir.Value) -> ir.Value:
    """A copy of the last Transpose behind `operand`, of the scaled weight. Others may read the weight as it was."""
    import onnx_ir as ir

    turn = operand.producer()
    assert turn is not None and turn.graph is not None and turn.inputs[0] is not None
    scaled = _times(turn.inputs[0], factors, turn)
    again = ir.node("Transpose", [scaled], {"perm": [1, 0]}, name=f"{turn.name or operand.name}.equalized")
    again.outputs[0].name, again.outputs[0].shape = f"{operand.name}.equalized", operand.shape
    if operand.dtype is not None:
        again.outputs[0].dtype = operand.dtype
    again.metadata_props.update(turn.metadata_props)
    turn.graph.insert_after(turn, again)
    return again.outputs[0]


def _times(weight: ir.Value, factors: ir.Value, place: ir.Node) -> ir.Value:
    """weight · factors, computed before `place`."""
    import onnx_ir as ir

    node = ir.node("Mul", [weight, factors], name=f"{weight.name}.scaled")
    node.outputs[0].name, node.outputs[0].shape = f"{weight.name}.scaled.value", weight.shape
    if weight.dtype is not None:
        node.outputs[0].dtype = weight.dtype
    node.metadata_props.update(place.metadata_props)
    assert place.graph is not None
    place.graph.insert_before(place, node)
    return node.outputs[0]
