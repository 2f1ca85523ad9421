"""Weights as 8-bit integers by channel, activations quantized as they come, one tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, Literal

from passes.graph.weights_aside import execution_of_graph
from passes.quantize.channel_quantization import quantize_channels
from passes.quantize.products import (
    MICROSOFT,
    Product,
    add_initializer,
    chosen_products,
    find_products,
    remove_unused,
    replace,
    report_counts,
    with_bias,
)
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
    import onnx_ir as ir


class QuantizeDynamic(Pass):
    """Quantize weights to 8 bits by channel, and activations as they come (DynamicQuantizeMatMul)."""

    name, version = "quantize_dynamic", 1
    accepts, produces = frozenset({"onnx"}), "onnx"
    libraries = ("numpy", "onnx", "onnx-ir")
    examples = (Example(tolerance=1.0),)

    class Params(PassParams):
        weight_type: Literal["int8", "uint8"] = Field(
            "int8", description="int8: symmetric around zero; uint8: with zero points"
        )
        per_channel: bool = Field(True, description="a scale for each output channel; false: one for the whole weight")
        reduce_range: bool = Field(
            False,
            description="7 bits of the 8: on x86 CPUs without VNNI, 8-bit products of large values overflow their sums",
        )
        exclude: list[str] = Field(
            default_factory=list,
            description="weights to leave as they are: names of weights or nodes, or patterns such as *.down_proj.*",
        )
        head: Literal["same", "keep"] = Field(
            "same", description="the language model's head: same as the rest, or keep"
        )

    @classmethod
    def predict(cls, params: Params, model: ModelSize) -> Prediction:
        """A byte for each weight; scales of channels count nothing, and `exclude` is not foreseen.

        One weight is in memory at a time, in float32 and as codes. Libraries as measured.
        """
        kinds = ("linear",) if params.head == "keep" else ("linear", "head")
        return Prediction(
            model=model.with_weights(kinds, params.weight_type, 1.0), conversion_bytes=76 * 10**6 + 2 * model.largest
        )

    def run(self, artifact: Artifact, params: Params, context: PassContext) -> Artifact:
        """Replace each MatMul or Gemm that has a constant weight by DynamicQuantizeMatMul.

        Raises: PipelineError where a pattern in `exclude` matches nothing, nothing is left to quantize, or a weight
        holds values that are not finite.
        """
        model = load_onnx(artifact)
        products = single_precision(find_products(model))
        chosen = chosen_products(products, model, artifact, exclude=params.exclude, keep_head=params.head == "keep")
        done: dict[Hashable, list[ir.Value | None]] = {}
        for count, product in enumerate(chosen):
            context.progress(count / len(chosen), product.weight_name)
            key = product.identity
            if key not in done:
                done[key] = _quantize(product, model, params, context)
            _replace(product, done[key])
        model.graph.opset_imports[MICROSOFT] = 1
        remove_unused(model)
        kind = f"{params.weight_type} {'by channel' if params.per_channel else 'by tensor'}, dynamic"
        report_counts(context, kind, len(chosen), [p for p in products if p not in chosen])
        return save_onnx(model, context.output, like=artifact, execution=execution_of_graph(artifact))


def single_precision(products: list[Product]) -> list[Product]:
    """Those with float32 activations, which alone ONNX Runtime's 8-bit products take.

    Raises: PipelineError where there are others only.
    """
    import onnx_ir as ir

    found = [product for product in products if product.dtype == ir.DataType.FLOAT]
    if products and not found:
        raise PipelineError("8-bit products take float32 activations, and all of this graph's are float16")
    return found


def _quantize(
    product: Product, model: ir.Model, params: QuantizeDynamic.Params, context: PassContext
) -> list[ir.Value | None]:
    """The inputs B, b_scale and b_zero_point of DynamicQuantizeMatMul, as new initializers."""
    signed = params.weight_type == "int8"
    try:
        result = quantize_channels(
            product.matrix(),
            signed=signed,
            per_channel=params.per_channel,
            reduce_range=params.reduce_range,
            threads=context.threads,
        )
    except ValueError as error:
        raise PipelineError(f"the weight {product.weight_name!r} cannot be quantized: {error}") from None
    name = product.weight_name
    codes = add_initializer(model, f"{name}.{params.weight_type}", result.codes, context)
    scales = add_initializer(model, f"{name}.scales", result.scales, context)
    zeros = None if signed else add_initializer(model, f"{name}.zero_points", result.zero_points, context)
    return [codes, scales, zeros]


def _replace(product: Product, weights: list[ir.Value | None]) -> None:
    import onnx_ir as ir

    old, bias = product.node, product.bias
    # the kernel takes one addend for every column, and does not broadcast as Gemm does
    columns = product.weight.shape[0 if product.transposed else 1] if product.weight.shape is not None else None
    fits = bias is not None and bias.shape is not None and list(bias.shape) == [columns]
    own = bias if fits else None
    inputs = [product.input, *weights, own]
    while inputs[-1] is None:
        inputs.pop()
    new = ir.node("DynamicQuantizeMatMul", inputs, domain=MICROSOFT, name=old.name, version=1)
    replace(old, with_bias(old, new, bias if own is None else None))
