"""The weights of graphs: how many are quantized, what data types they have, how many numbers they hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

QUANTIZED_PRODUCTS = frozenset(
    {
        ("com.microsoft", "MatMulNBits"),
        ("com.microsoft", "DynamicQuantizeMatMul"),
        ("com.microsoft", "MatMulIntegerToFloat"),
        ("com.microsoft", "MatMulBnb4"),
        ("com.microsoft", "QMoE"),
        ("", "MatMulInteger"),
        ("", "QLinearMatMul"),
    }
)
"""Operators that multiply by quantized weights."""

PRODUCTS = frozenset({("", "MatMul"), ("", "Gemm")})
PASSED_THROUGH = frozenset({"Transpose", "Cast", "Identity", "Reshape"})
"""Between a constant weight and the product that takes it."""


def newly_quantized(pairs: Iterable[tuple[ir.Model, ir.Model]]) -> tuple[int, int] | None:
    """(products that are quantized in the second of a pair as none was in the first, those that could have been).

    These are the products by constant weights of the first of each pair, and where quantized ones were quantized anew,
    those, too. None where nothing was quantized.
    """
    sides = list(pairs)
    counts = [(_quantized(before), _quantized(after)) for before, after in sides]
    done = sum((new - old).total() for old, new in counts)
    if done == 0:
        return None
    anew = any((old - new).total() > 0 for old, new in counts)
    could = sum(_plain_products(before) for before, _ in sides)
    return done, could + (sum(old.total() for old, _ in counts) if anew else 0)


def restored(before: ir.Model, after: ir.Model) -> bool:
    """Whether quantized products of `before` are products by plain weights in `after`."""
    fewer = (_quantized(before) - _quantized(after)).total() > 0
    return fewer and _plain_products(after) > _plain_products(before)


def _plain_products(model: ir.Model) -> int:
    """Products by constant weights that are not quantized."""
    return sum(1 for node in nodes_in(model) if _has_constant_weight(node))


def _quantized(model: ir.Model) -> Counter[tuple[object, ...]]:
    """Quantized products by how they are: operator, data type of the weights, bits, block size."""
    found: Counter[tuple[object, ...]] = Counter()
    for node in nodes_in(model):
        if _is_quantized(node):
            weights = [_origin(value).const_value for value in node.inputs[:2] if value is not None]
            types = [tensor.dtype.name for tensor in weights if tensor is not None]
            sizes = (node.attributes.get_int("bits", 0), node.attributes.get_int("block_size", 0))
            found[node.domain, node.op_type, *types, *sizes] += 1
    return found


def _is_quantized(node: ir.Node) -> bool:
    """Whether it multiplies by quantized weights: by itself, or after a DequantizeLinear of constants."""
    if (node.domain, node.op_type) in QUANTIZED_PRODUCTS:
        return True
    if (node.domain, node.op_type) not in PRODUCTS:
        return False
    return any(_is_stored_quantized(value) for value in node.inputs[:2] if value is not None)


def _is_stored_quantized(value: ir.Value) -> bool:
    """Whether it is a constant weight that a DequantizeLinear restores; a quantized activation is none."""
    node = _origin(value).producer()
    if node is None or (node.domain, node.op_type) != ("", "DequantizeLinear") or node.inputs[0] is None:
        return False
    return _is_constant_matrix(node.inputs[0])


def _has_constant_weight(node: ir.Node) -> bool:
    if (node.domain, node.op_type) not in PRODUCTS:
        return False
    return any(_is_constant_matrix(value) for value in node.inputs[:2] if value is not None)


def _is_constant_matrix(value: ir.Value) -> bool:
    """Whether it is an initializer of at least two dimensions, seen through casts …"""
    origin = _origin(value)
    tensor = origin.const_value
    return origin.producer() is None and tensor is not None and len(tensor.shape) >= 2


def _origin(value: ir.Value) -> ir.Value:
    """What `value` is made of, seen through casts, transpositions, factors of channels …"""
    node = value.producer()
    while node is not None and node.inputs and node.inputs[0] is not None:
        if node.op_type not in PASSED_THROUGH and not _scales_a_constant(node):
            break
        value = node.inputs[0]
        node = value.producer()
    return value


def _scales_a_constant(node: ir.Node) -> bool:
    """Whether it multiplies by an initializer, as channels of a weight are scaled."""
    return node.op_type == "Mul" and not node.domain and node.inputs[1] is not None and node.inputs[1].is_initializer()


FEW_NUMBERS = 256
"""Tensors of up to so many are shapes, scalars and tables as much as weights: they are counted in no format."""

NO_NUMBERS = frozenset({"int64", "int32", "bool", "string"})
"""Data types of shapes, positions and masks, which are no weights."""

AUXILIARY = {
    ("com.microsoft", "MatMulNBits"): (2, 5),
    ("com.microsoft", "MatMulBnb4"): (2, 3),
    ("com.microsoft", "DynamicQuantizeMatMul"): (2, 4),
    ("com.microsoft", "MatMulIntegerToFloat"): (2, 6),
    ("com.microsoft", "GatherBlockQuantized"): (2, 4),
    ("", "DequantizeLinear"): (1, 3),
    ("", "QLinearMatMul"): (1, 3),
    ("", "RotaryEmbedding"): (1, 3),
    ("com.microsoft", "RotaryEmbedding"): (2, 4),
    ("com.microsoft", "GroupQueryAttention"): (7, 9),
}
"""Inputs [from, to) that are no parameters: they say what stored numbers stand for (scales, zero points, orders), or
are tables of cosines and sines."""

PACKED = {("com.microsoft", "MatMulNBits"), ("com.microsoft", "MatMulBnb4")}
"""Operators whose weights, input 1, are K x N numbers in fewer bytes."""


def dtype_name(dtype: ir.DataType) -> str:
    """As NumPy and PyTorch call it; ONNX says FLOAT for 32 bits."""
    return {"FLOAT": "float32", "DOUBLE": "float64"}.get(dtype.name, dtype.name.lower())


def weights_of(models: Iterable[ir.Model]) -> dict[object, ir.TensorProtocol]:
    """The weights among the initializers, by where they lie: shared ones are one."""
    return {
        identity_of(tensor): tensor
        for model in models
        for graph in model.graphs()
        for value in graph.initializers.values()
        if (tensor := value.const_value) is not None and is_weight(dtype_name(tensor.dtype), prod(tensor.shape.numpy()))
    }


def is_weight(dtype: str, numbers: int) -> bool:
    """Whether a tensor of so many numbers is counted among the weights: of checkpoints and graphs alike."""
    return numbers > FEW_NUMBERS and dtype not in NO_NUMBERS


def data_types(models: Collection[ir.Model]) -> Counter[str]:
    """Weights by data type."""
    return Counter(dtype_name(tensor.dtype) for tensor in weights_of(models).values())


def parameters(models: Collection[ir.Model]) -> int:
    """Numbers in the weights that nodes read, however they are packed; shared weights count once."""
    sizes: dict[object, int] = {}
    no_parameters = set()
    for model in models:
        for node in nodes_in(model):
            kind = (node.domain, node.op_type)
            begin, end = AUXILIARY.get(kind, (0, 0))
            for at, value in enumerate(node.inputs):
                tensor = value.const_value if value is not None and value.is_initializer() else None
                if tensor is None:
                    continue
                identity = identity_of(tensor)
                if begin <= at < end:
                    no_parameters.add(identity)
                    continue
                numbers = prod(tensor.shape.numpy())
                if kind in PACKED and at == 1:
                    numbers = node.attributes.get_int("K", 0) * node.attributes.get_int("N", 0)
                if is_weight(dtype_name(tensor.dtype), numbers):
                    sizes[identity] = max(numbers, sizes.get(identity, 0))
    return sum(size for identity, size in sizes.items() if identity not in no_parameters)


def identity_of(tensor: ir.TensorProtocol) -> object:
    """Equal for tensors whose bytes lie in one place."""
    from pipeline.stored_tensor import StoredTensor

    if isinstance(tensor, StoredTensor) and tensor.entry is not None:
        return tensor.entry.digest, tensor.ref.offset, tensor.ref.length
    return id(tensor)


def nodes_in(model: ir.Model) -> Iterator[ir.Node]:
    """Every node, those of subgraphs among them, and those of the model's functions once."""
    for graph in model.graphs():
        yield from graph
    for function in model.functions.values():
        yield from function.all_nodes()
