"""Constant weights of matrix multiplications as 4- or 8-bit integers in blocks, one tensor in memory at a time."""

from __future__ import annotations

import difflib
from collections import deque
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Literal

from passes.quantize.block_quantization import quantize_blocks
from pipeline import Artifact, Field, Pass, PassContext, PassParams, PipelineError, load_onnx, new_tensor, save_onnx

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

DOMAIN = "com.microsoft"


class QuantizeWeights(Pass):
    """Quantize the weights of matrix multiplications to 4 or 8 bits, round to nearest in blocks (MatMulNBits)."""

    name, version = "quantize_weights", 1
    accepts, produces = frozenset({"onnx"}), "onnx"
    libraries = ("numpy", "onnx", "onnx-ir")

    class Params(PassParams):
        bits: Literal[4, 8] = Field(4, description="bits of a weight")
        block_size: Literal[16, 32, 64, 128, 256] = Field(
            32, description="weights along the input dimension that share a scale; larger is faster and less exact"
        )
        symmetric: bool = Field(
            True, description="scales only; false adds a zero point to each block, which fits skewed weights better"
        )
        accuracy_level: Literal[0, 1, 2, 3, 4] = Field(
            4,
            description="how ONNX Runtime may compute: 0 unset, 1 float32, 2 float16, 3 bfloat16, 4 int8 activations, "
            "which is the fast one on CPUs",
        )
        exclude: list[str] = Field(
            default_factory=list, description="weights to leave as they are: names or patterns such as *.down_proj.*"
        )
        head: bool = Field(True, description="quantize the language model's head, too")

    def run(self, artifact: Artifact, params: Params, context: PassContext) -> Artifact:
        """Replace each MatMul or Gemm that has a constant weight by MatMulNBits.

        Raises: PipelineError where a pattern in `exclude` matches no weight, nothing is left to quantize, or a weight
        holds values that are not finite.
        """
        model = load_onnx(artifact)
        products = find_products(model)
        if not products:
            raise PipelineError("the graph multiplies by no constant float weight: there is nothing to quantize")
        skipped = _excluded(params.exclude, {product.weight_name for product in products})
        chosen = [product for product in products if product.weight_name not in skipped]
        if not params.head:
            head = _head(model, artifact.interface.outputs.get("logits", "logits"), products)
            chosen = [product for product in chosen if product.node is not head]
        if not chosen:
            raise PipelineError(f"all {len(products)} weights are excluded: there is nothing to quantize")
        done: dict[tuple[str, bool, str], list[ir.Value]] = {}
        for count, product in enumerate(chosen):
            context.progress(count / len(chosen), product.weight_name)
            key = (product.weight_name, product.transposed, str(product.dtype))
            if key not in done:
                done[key] = _quantize(product, model, params, context)
            _replace(product, done[key], params)
        model.graph.opset_imports[DOMAIN] = 1
        _remove_unused(model)
        return save_onnx(model, context.output, like=artifact)


@dataclass(frozen=True)
class Product:
    """x · W with a constant W: stored as [N, K] where `transposed`, else as [K, N]."""

    node: ir.Node
    weight: ir.Value
    transposed: bool
    bias: ir.Value | None = None

    @property
    def weight_name(self) -> str:
        return str(self.weight.name)

    @property
    def dtype(self) -> ir.DataType:
        """Data type of the activations."""
        import onnx_ir as ir

        found = self.node.inputs[0].dtype if self.node.inputs[0] is not None else None
        return found or self.node.outputs[0].dtype or ir.DataType.FLOAT


def find_products(model: ir.Model) -> list[Product]:
    """Every product that MatMulNBits can stand for, in the graph's order."""
    import onnx_ir as ir

    found = []
    for node in model.graph.all_nodes():
        product = _matmul(node) if node.op_type == "MatMul" else _gemm(node) if node.op_type == "Gemm" else None
        if product and not node.domain and product.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
            found.append(product)
    return found


def _matmul(node: ir.Node) -> Product | None:
    weight, transposed = _constant(node.inputs[1])
    return Product(node, weight, transposed) if weight is not None else None


def _gemm(node: ir.Node) -> Product | None:
    """alpha · A · B + beta · C, where alpha and beta are 1 and A is not transposed."""
    attributes = node.attributes
    plain = (
        attributes.get_float("alpha", 1.0) == 1.0
        and attributes.get_float("beta", 1.0) == 1.0
        and not attributes.get_int("transA", 0)
    )
    weight, transposed = _constant(node.inputs[1])
    if not plain or weight is None:
        return None
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    return Product(node, weight, transposed != bool(attributes.get_int("transB", 0)), bias)


def _constant(value: ir.Value | None) -> tuple[ir.Value | None, bool]:
    """(the float matrix that `value` is, seen through casts and transpositions; whether it is transposed)."""
    transposed = False
    while value is not None and (node := value.producer()) is not None:
        if node.domain or node.op_type not in ("Cast", "Identity", "Transpose"):
            return None, False
        if node.op_type == "Transpose":
            permutation = node.attributes.get_ints("perm", (1, 0))
            if tuple(permutation) not in ((0, 1), (1, 0)):
                return None, False
            transposed ^= tuple(permutation) == (1, 0)
        value = node.inputs[0]
    tensor = value.const_value if value is not None else None
    if value is None or tensor is None or value.is_graph_input() or len(tensor.shape) != 2 or not tensor.size:
        return None, False
    return (value, transposed) if tensor.dtype.is_floating_point() and tensor.dtype.bitwidth >= 16 else (None, False)


def _excluded(patterns: list[str], names: set[str]) -> set[str]:
    """The names that some pattern matches.

    Raises: PipelineError where a pattern matches none.
    """
    excluded: set[str] = set()
    for pattern in patterns:
        matched = {name for name in names if fnmatchcase(name, pattern)}
        if not matched:
            near = difflib.get_close_matches(pattern, sorted(names), n=1, cutoff=0)
            raise PipelineError(
                f"exclude: {pattern!r} matches none of the {len(names)} weights", hint=f"the nearest is {near[0]!r}"
            )
        excluded |= matched
    return excluded


def _head(model: ir.Model, logits: str, products: list[Product]) -> ir.Node | None:
    """The product nearest to the logits; what follows it (scaling, soft capping) has no weights of its own."""
    nodes = {product.node for product in products}
    waiting = deque(value.producer() for value in model.graph.outputs if value.name == logits)
    seen = set()
    while waiting:
        node = waiting.popleft()
        if node is None or node in seen:
            continue
        if node in nodes:
            return node
        seen.add(node)
        waiting.extend(value.producer() for value in node.inputs if value is not None)
    return None


def _quantize(
    product: Product, model: ir.Model, params: QuantizeWeights.Params, context: PassContext
) -> list[ir.Value]:
    """The inputs B, scales and, where asymmetric, zero_points of MatMulNBits, as new initializers."""
    assert product.weight.const_value is not None
    stored = product.weight.const_value.numpy()
    matrix = stored if product.transposed else stored.T  # [N, K]
    try:
        result = quantize_blocks(
            matrix,
            bits=params.bits,
            block_size=params.block_size,
            symmetric=params.symmetric,
            threads=context.threads,
        )
    except ValueError as error:
        raise PipelineError(f"the weight {product.weight_name!r} cannot be quantized: {error}") from None
    arrays: dict[str, np.ndarray] = {
        f"q{params.bits}": result.codes,
        "scales": result.scales.astype(product.dtype.numpy(), copy=False),
    }
    if result.zero_points is not None:
        arrays["zero_points"] = result.zero_points
    return [_initializer(model, f"{product.weight_name}.{part}", array, context) for part, array in arrays.items()]


def _initializer(model: ir.Model, name: str, array: np.ndarray, context: PassContext) -> ir.Value:
    import onnx_ir as ir

    while name in model.graph.initializers:  # one weight used both ways, [N, K] and [K, N]
        name += "_"
    tensor = new_tensor(context.output, name, array)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
    model.graph.register_initializer(value)
    return value


def _replace(product: Product, weights: list[ir.Value], params: QuantizeWeights.Params) -> None:
    import onnx_ir as ir

    old = product.node
    assert product.weight.const_value is not None and old.graph is not None
    rows, columns = product.weight.const_value.shape.numpy()
    attributes: dict[str, int] = {
        "K": columns if product.transposed else rows,
        "N": rows if product.transposed else columns,
        "bits": params.bits,
        "block_size": params.block_size,
        "accuracy_level": params.accuracy_level,
    }
    new = ir.node("MatMulNBits", [old.inputs[0], *weights], attributes, domain=DOMAIN, name=old.name, version=1)
    nodes = [new]
    if product.bias is not None:
        nodes.append(ir.node("Add", [new.outputs[0], product.bias], name=f"{old.name}.bias"))
        new.outputs[0].name = f"{old.outputs[0].name}.product"
        new.outputs[0].type, new.outputs[0].shape = old.outputs[0].type, old.outputs[0].shape
    for node in nodes:
        node.metadata_props.update(old.metadata_props)
    ir.convenience.replace_nodes_and_values(old.graph, old, [old], nodes, old.outputs, nodes[-1].outputs)


def _remove_unused(model: ir.Model) -> None:
    """Remove the transpositions, casts and weights that nothing reads any more."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    RemoveUnusedNodesPass()(model)
