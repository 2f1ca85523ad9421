"""8-bit weights by channel and 8-bit activations whose ranges the calibration text gave, as QuantizeLinear pairs."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import TYPE_CHECKING, Literal

from pydantic import model_validator

from passes.graph.weights_aside import execution_of_graph
from passes.quantize.calibration import RUN_TOKENS, calibration_tokens
from passes.quantize.channel_quantization import quantize_channels
from passes.quantize.products import (
    Product,
    add_initializer,
    chosen_products,
    find_products,
    refuse_subgraphs,
    remove_unused,
    replace,
    report_counts,
    with_bias,
)
from passes.quantize.quantize_dynamic import single_precision
from passes.quantize.ranges import Method, activation_ranges
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
    import numpy as np
    import onnx_ir as ir

ACTIVATION_BYTES = 512 << 20
"""Activations that one run of the graph may yield; more take further passes over the calibration text."""

FIRST_OPSET = 13
"""The first with scales by channel."""


class QuantizeStatic(Pass):
    """Quantize weights to 8 bits by channel, and activations to ranges found on the calibration text (QDQ)."""

    name, version = "quantize_static", 1
    accepts, produces = frozenset({"onnx"}), "onnx"
    libraries = ("numpy", "onnx", "onnx-ir", "onnxruntime", "tokenizers")
    depends_on = ("calibration_text", "seed")
    examples = (Example(params={"samples": 8, "sequence_length": 32}, tolerance=1.5),)

    class Params(PassParams):
        method: Method = Field(
            "minmax",
            description="ranges of activations: minmax: all that was seen. percentile: without the outermost values. "
            "entropy: the range whose quantized distribution is nearest to the one seen",
        )
        percentile: float = Field(99.999, gt=50, lt=100, description="percentile: share of the values that stays, in %")
        bins: int | None = Field(
            None,
            ge=512,
            le=16384,
            description="bins of a histogram; default: 2048 for percentile, 512 for entropy, which cuts off the more "
            "the more bins it has",
        )
        activation_type: Literal["uint8", "int8"] = Field(
            "uint8",
            description="integers of the activations; with int8, ONNX Runtime on x86 computes products that share an "
            "input (q, k and v; gate and up) in float32",
        )
        operators: list[Literal["MatMul", "Gemm"]] = Field(
            ["MatMul", "Gemm"], min_length=1, description="products to quantize"
        )
        samples: int = Field(32, ge=1, description="pieces of the calibration text")
        sequence_length: int = Field(512, ge=2, description="tokens of each, the last few one by one after a cache")
        reduce_range: bool = Field(
            False,
            description="7 bits of the weights' 8: on x86 CPUs without VNNI, 8-bit products of large values overflow "
            "their sums",
        )
        exclude: list[str] = Field(
            default_factory=list,
            description="weights to leave as they are: names of weights or nodes, or patterns such as *.down_proj.*",
        )
        head: Literal["same", "keep"] = Field(
            "same", description="the language model's head: same as the rest, or keep"
        )

        @model_validator(mode="after")
        def _fit_together(self) -> QuantizeStatic.Params:
            fields = type(self).model_fields
            if self.method != "percentile" and self.percentile != fields["percentile"].default:
                raise ValueError(f"percentile: for `method: percentile` only, and this is {self.method}")
            if self.method == "minmax" and self.bins is not None:
                raise ValueError("bins: for `method: percentile` and `entropy` only, and this is minmax")
            return self

    @classmethod
    def predict(cls, params: Params, model: ModelSize) -> Prediction:
        """A byte for each weight; `exclude` is not foreseen, and what calibration takes is not known."""
        kinds = ("linear",) if params.head == "keep" else ("linear", "head")
        return Prediction(model=model.with_weights(kinds, "int8", 1.0))

    def run(self, artifact: Artifact, params: Params, context: PassContext) -> Artifact:
        """Put QuantizeLinear and DequantizeLinear before each chosen product, and its weight into 8 bits.

        Raises: PipelineError where a pattern in `exclude` matches nothing, nothing is left to quantize, a weight or an
        activation holds values that are not finite, or the graph cannot be calibrated.
        """
        model = load_onnx(artifact)
        opset = model.graph.opset_imports.get("", 0)
        if opset < FIRST_OPSET:
            raise PipelineError(f"the graph has opset {opset}; scales by channel need {FIRST_OPSET} or later")
        products = [p for p in single_precision(find_products(model)) if p.node.op_type in params.operators]
        chosen = chosen_products(products, model, artifact, exclude=params.exclude, keep_head=params.head == "keep")
        refuse_subgraphs(chosen, model)
        tokens = calibration_tokens(artifact, context, samples=params.samples, length=params.sequence_length)
        widths = {str(product.input.name): product.shape[1] for product in chosen}
        activations: dict[str, list[ir.Value]] = {}
        weights: dict[Hashable, list[ir.Value]] = {}
        groups = list(_groups(widths))
        for count, names in enumerate(groups):
            context.progress(0.8 * count / len(groups), f"calibrating {len(names)} of {len(widths)} activations")
            ranges = activation_ranges(
                artifact,
                names,
                tokens,
                context=context,
                method=params.method,
                bins=params.bins,
                percentile=params.percentile,
            )
            for name, limits in ranges.items():
                value = next(product.input for product in chosen if product.input.name == name)
                activations[name] = _quantize_activation(model, value, limits, params.activation_type, context)
        for count, product in enumerate(chosen):
            context.progress(0.8 + 0.2 * count / len(chosen), product.weight_name)
            key = product.identity
            if key not in weights:
                weights[key] = _quantize_weight(model, product, params, context)
            _replace(product, activations[str(product.input.name)], weights[key])
        remove_unused(model)
        kind = f"int8 by channel, {params.activation_type} activations, {params.method} of {tokens.size} tokens"
        report_counts(context, kind, len(chosen), [p for p in products if p not in chosen])
        return save_onnx(model, context.output, like=artifact, execution=execution_of_graph(artifact))


def _groups(widths: dict[str, int]) -> Iterator[list[str]]:
    """Names in order, in groups whose activations in one run take at most ACTIVATION_BYTES, or one by one."""
    group: list[str] = []
    size = 0
    for name, width in widths.items():
        own = 4 * RUN_TOKENS * width
        if group and size + own > ACTIVATION_BYTES:
            yield group
            group, size = [], 0
        group.append(name)
        size += own
    if group:
        yield group


def activation_parameters(low: float, high: float, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """(scale float32 [], zero point of type `kind` []) of 8 bits that span `low`, `high` and zero."""
    import numpy as np

    first = np.iinfo(kind).min
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / 255
    if scale < np.finfo(np.float32).tiny:
        return np.array(1, np.float32), np.array(0, kind)
    return np.array(scale, np.float32), np.array(np.clip(np.rint(first - low / scale), first, first + 255), kind)


def _quantize_activation(
    model: ir.Model, value: ir.Value, limits: tuple[float, float], kind: str, context: PassContext
) -> list[ir.Value]:
    """`value` as integers of that kind, the scale and the zero point."""
    import onnx_ir as ir

    scale, zero = activation_parameters(*limits, kind)
    constants = [
        add_initializer(model, f"{value.name}.scale", scale, context),
        add_initializer(model, f"{value.name}.zero_point", zero, context),
    ]
    node = ir.node("QuantizeLinear", [value, *constants], name=f"{value.name}.quantize")
    codes = node.outputs[0]
    codes.name, codes.shape = f"{value.name}.{kind}", value.shape
    codes.dtype = ir.DataType.from_numpy(zero.dtype)
    made = value.producer()
    if made is not None:
        model.graph.insert_after(made, node)
    else:
        model.graph.insert_before(model.graph[0], node)
    return [codes, *constants]


def _quantize_weight(
    model: ir.Model, product: Product, params: QuantizeStatic.Params, context: PassContext
) -> list[ir.Value]:
    """The weight as int8 [K, N], the scales and the zero points [N]."""
    try:
        result = quantize_channels(product.matrix(), reduce_range=params.reduce_range, threads=context.threads)
    except ValueError as error:
        raise PipelineError(f"the weight {product.weight_name!r} cannot be quantized: {error}") from None
    parts = {"int8": result.codes, "scales": result.scales, "zero_points": result.zero_points}
    return [add_initializer(model, f"{product.weight_name}.{part}", array, context) for part, array in parts.items()]


def _replace(product: Product, activation: list[ir.Value], weight: list[ir.Value]) -> None:
    """Dequantize both and multiply, which ONNX Runtime makes one product of integers.

    Each product has its own DequantizeLinear, as ONNX Runtime wants it.
    """
    import onnx_ir as ir

    old = product.node
    left = ir.node("DequantizeLinear", activation, name=f"{old.name}.activation")
    right = ir.node("DequantizeLinear", weight, {"axis": 1}, name=f"{old.name}.weight")
    for node in (left, right):
        assert node.inputs[0] is not None
        value = node.outputs[0]
        value.name, value.shape, value.dtype = f"{node.name}.restored", node.inputs[0].shape, ir.DataType.FLOAT
    new = ir.node("MatMul", [left.outputs[0], right.outputs[0]], name=old.name)
    replace(old, [left, right, *with_bias(old, new, product.bias)])
