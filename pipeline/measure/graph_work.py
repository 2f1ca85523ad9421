"""The work of an ONNX graph, node by node, at given sizes. Weights are not read: their shapes are enough."""

from __future__ import annotations

import json
import mmap
from collections.abc import Hashable, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.artifact import ONNX_FILE, Artifact, Component, TensorRef
from pipeline.errors import PipelineError
from pipeline.measure.graph_shapes import (
    MICROSOFT,
    Step,
    Value,
    attention_sizes,
    attributes,
    factor,
    product_shape,
    steps,
)
from pipeline.measure.work_counts import Extent, Work
from pipeline.onnx_wire import check_external_tensors
from pipeline.runtime.onnxruntime import COMPILED_FILE

if TYPE_CHECKING:
    import onnx

SMALL = 64
"""Elements of an initializer whose contents are read, as shapes may be computed from them."""

MATRIX_PRODUCTS = {
    ("", "MatMul"): (0, 1),
    ("", "Gemm"): (0, 1),
    ("", "MatMulInteger"): (0, 1),
    ("", "QLinearMatMul"): (0, 3),
    (MICROSOFT, "FusedMatMul"): (0, 1),
    (MICROSOFT, "FusedGemm"): (0, 1),
    (MICROSOFT, "TransposeMatMul"): (0, 1),
    (MICROSOFT, "MatMulIntegerToFloat"): (0, 1),
    (MICROSOFT, "DynamicQuantizeMatMul"): (0, 1),
    (MICROSOFT, "QGemm"): (0, 3),
}
"""Products of two matrices: the inputs that they are."""

PACKED_PRODUCTS = {(MICROSOFT, "MatMulNBits"), (MICROSOFT, "MatMulBnb4")}
"""Products whose attributes K and N say how large the weight is."""

CONVOLUTIONS = {("", "Conv"): 1, ("", "ConvInteger"): 1, ("", "QLinearConv"): 3, (MICROSOFT, "FusedConv"): 1}
"""Convolutions: the input that is the kernel."""

ATTENTIONS = {
    ("", "Attention"),
    (MICROSOFT, "Attention"),
    (MICROSOFT, "GroupQueryAttention"),
    (MICROSOFT, "MultiHeadAttention"),
}

INTEGER_PRODUCTS = {"MatMulInteger", "QLinearMatMul", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QGemm"} | {
    "ConvInteger",
    "QLinearConv",
}

NOT_COUNTED = {"MoE", "QMoE", "SparseAttention", "PagedAttention", "PackedAttention", "PackedMultiHeadAttention"} | {
    "DecoderMaskedMultiHeadAttention",
    "DecoderMaskedSelfAttention",
    "Einsum",
    "ConvTranspose",
    "LSTM",
    "GRU",
    "RNN",
}
"""Operators with products that nothing here counts."""

ACCURACY_LEVELS = {2: "float16", 3: "bfloat16", 4: "int8"}
"""MatMulNBits: the data type that it computes in; with others, that of its input."""

LOOKUPS = {
    ("", "Gather"): (0,),
    (MICROSOFT, "GatherBlockQuantized"): (0, 2, 3),
}
"""Operators that read rows of constant tables: which of their inputs those are. The places are input 1."""

POSITION_TABLES = {
    ("", "RotaryEmbedding"): (1, 2),
    (MICROSOFT, "RotaryEmbedding"): (2, 3),
    (MICROSOFT, "GroupQueryAttention"): (7, 8),
}
"""Inputs that are tables of cosines and sines, of which a token's position needs a row."""

PACKED = "packed"

HALF = frozenset({"float16", "bfloat16"})


class _Constant(NamedTuple):
    """A constant as an operator takes it: equal keys are the same bytes."""

    key: Hashable
    size_bytes: int


def count_graph(artifact: Artifact, extent: Extent, *, device: str = "cpu") -> Work:
    """The work of a graph's only component.

    What is computed from constants alone counts as a constant, as ONNX Runtime folds it when it loads: a bfloat16
    weight behind a Cast to float32 is read as float32. Its CPU provider has no products of half precision, so it widens
    those weights, too. A DequantizeLinear is not folded: what it reads counts as it is stored.

    Raises: PipelineError where the graph cannot be read.
    """
    import onnx

    component = artifact.component
    model = _read(artifact, component)
    graph = model.graph
    opsets = {opset.domain if opset.domain != "ai.onnx" else "": opset.version for opset in model.opset_import}
    inputs = _inputs(graph, artifact, extent)
    initializers, constants = _initializers(graph, artifact, component)
    counted = _Counter(constants, extent, device, _widths(onnx))
    for step in steps(graph, opsets, {**inputs, **initializers}):
        counted.node(step)
    roles = artifact.interface.inputs
    cache = {name: inputs[name] for role, name in roles.items() if role.startswith("past.") and name in inputs}
    return Work(
        tokens=extent.tokens,
        weights_bytes=sum(counted.weights.values()),
        rows_bytes=counted.rows_bytes,
        cache_bytes=sum(counted.cached_bytes(name, value) for name, value in cache.items()),
        flops=counted.flops,
        launches=counted.launches,
        uncounted=tuple(sorted(counted.uncounted)),
    )


def _read(artifact: Artifact, component: Component) -> onnx.ModelProto:
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    path = artifact.locate(component.files[ONNX_FILE])
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        check_external_tensors(data, component.tensors)
    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise PipelineError(f"{ONNX_FILE} is damaged: {error}") from error
    if model.functions:
        from onnx import inliner

        model = inliner.inline_local_functions(model)
    return model


def _widths(onnx: Any) -> Mapping[int, float]:
    """ONNX's number of a data type -> bytes of an element."""
    import onnx_ir as ir

    kinds = onnx.TensorProto.DataType.values()
    return {int(kind): ir.DataType(kind).itemsize for kind in kinds if kind not in (0, onnx.TensorProto.STRING)}


def _inputs(graph: onnx.GraphProto, artifact: Artifact, extent: Extent) -> dict[str, Value]:
    """The graph's inputs as a runner would give them. A size that nobody names is 1."""
    import numpy as np

    interface = artifact.interface
    whole = extent.past + extent.length
    sizes = {
        "tokens": (extent.batch, extent.length),
        "mask": (extent.batch, whole),
        "positions": (extent.batch, extent.length),
    }
    found: dict[str, Value] = {}
    roles = {name: role for role, name in interface.inputs.items()}
    for given in graph.input:
        tensor = given.type.tensor_type
        told = [size.dim_value if size.HasField("dim_value") else None for size in tensor.shape.dim]
        role = roles.get(given.name, "")
        if role.startswith("past.") and len(told) == 4:  # [B, kv_heads, T, head_dim]
            layout = interface.cache
            heads = told[1] or (layout.kv_heads if layout else 1)
            shape: tuple[int, ...] = (extent.batch, heads, extent.past, told[3] or (layout.head_dim if layout else 1))
        elif role in sizes and len(sizes[role]) == len(told):
            shape = sizes[role]
        else:
            shape = tuple(size if size is not None else 1 for size in told)
        contents = None
        if given.name == interface.logits_to_keep:
            contents = np.full(shape, extent.keep, np.int64)
        found[given.name] = Value(tensor.elem_type, shape, contents)
    return found


def _initializers(
    graph: onnx.GraphProto, artifact: Artifact, component: Component
) -> tuple[dict[str, Value], dict[str, _Constant]]:
    """What is known of each, and the bytes that reading it takes: those of its packed form where there is one."""
    from onnx import numpy_helper

    record = component.files.get(COMPILED_FILE)
    packed: dict[str, Any] = {}
    if record is not None:
        packed = json.loads(artifact.locate(record).read_text(encoding="utf-8"))["weights"]
    values, constants = {}, {}
    for tensor in graph.initializer:
        shape = tuple(tensor.dims)
        ref = component.tensors.get(tensor.name)
        contents = None
        if prod(shape) <= SMALL:
            contents = artifact.tensor(tensor.name) if _is_outside(tensor) else numpy_helper.to_array(tensor)
        values[tensor.name] = Value(tensor.data_type, shape, contents)
        constants[tensor.name] = _constant(tensor, ref, component, packed.get(tensor.name, {}))
    return values, constants


def _is_outside(tensor: onnx.TensorProto) -> bool:
    return bool(tensor.data_location == tensor.EXTERNAL)


def _constant(
    tensor: onnx.TensorProto, ref: TensorRef | None, component: Component, packed: Mapping[str, Any]
) -> _Constant:
    """`packed`: its packed forms, by entry of the record of a compiled graph."""
    import onnx_ir as ir

    if packed:
        parts = {part for form in packed.values() for part in form["parts"]}
        return _Constant((PACKED, tensor.name), sum(component.tensors[part].length for part in parts))
    if ref is None or not _is_outside(tensor):
        return _Constant(tensor.name, round(prod(tensor.dims) * ir.DataType(tensor.data_type).itemsize))
    return _Constant((component.files[ref.file].digest, ref.offset, ref.length), ref.length)


class _Counter:
    """Takes the nodes of a graph in order and adds up what they read and compute."""

    def __init__(
        self, constants: dict[str, _Constant], extent: Extent, device: str, widths: Mapping[int, float]
    ) -> None:
        self._constants = constants
        self._extent = extent
        self._device = device
        self._widths = widths
        self._dequantized: set[str] = set()
        self._windows: dict[str, int] = {}
        self.weights: dict[Hashable, int] = {}
        self.rows_bytes = 0
        self.flops: dict[str, int] = {}
        self.launches = 0
        self.uncounted: set[str] = set()

    def node(self, step: Step) -> None:
        node = step.node
        named = [name for name in node.input if name]
        if node.op_type == "Constant" or (named and self._is_folded(node, named)):
            self._fold(step, named)
            return
        self.launches += 1
        if node.op_type == "DequantizeLinear" or (
            node.op_type in ("Transpose", "Reshape", "Cast") and named and named[0] in self._dequantized
        ):
            self._dequantized.update(node.output)
        self._read(step)
        self._compute(step)

    def cached_bytes(self, name: str, value: Value) -> int:
        """Of one input of the cache: what the operator that takes it reads."""
        elements = value.elements or 0
        window = self._windows.get(name)
        if window is not None and self._extent.past:
            elements = elements * min(window, self._extent.past) // self._extent.past
        return round(elements * self._widths.get(value.dtype, 4))

    def _is_folded(self, node: onnx.NodeProto, named: Sequence[str]) -> bool:
        quiet = node.op_type not in ("DequantizeLinear", "QuantizeLinear") and not _has_subgraph(node)
        return quiet and all(name in self._constants for name in named)

    def _fold(self, step: Step, named: Sequence[str]) -> None:
        large = max((self._constants[name] for name in named), key=lambda c: c.size_bytes, default=None)
        for name, value in zip(step.node.output, step.outputs, strict=True):
            size = large.size_bytes if large else 0
            if value.elements is not None:
                size = round(value.elements * self._widths.get(value.dtype, 4))
            key = (large.key, value.dtype, value.elements) if large and len(named) == 1 else name
            self._constants[name] = _Constant(key, size)

    def _read(self, step: Step) -> None:
        node = step.node
        kind = (node.domain, node.op_type)
        rows = LOOKUPS.get(kind, ())
        positions = POSITION_TABLES.get(kind, ())
        packed = kind in PACKED_PRODUCTS and self._is_packed(node.input[1])
        for place, (name, value) in enumerate(zip(node.input, step.inputs, strict=True)):
            constant = self._constants.get(name)
            if constant is None or value is None or (packed and place in (2, 3)):
                continue
            if place in rows and attributes(node).get("axis", 0) == 0:
                places = step.inputs[1]
                wanted = places.elements if places is not None else None
                self.rows_bytes += _rows(constant, value, wanted)
            elif place in positions and value.shape and len(value.shape) == 2:
                self.rows_bytes += _rows(constant, value, self._extent.length)
            else:
                widened = kind in MATRIX_PRODUCTS and self._device == "cpu" and _name(value.dtype) in HALF
                self.weights[constant.key] = constant.size_bytes * (2 if widened else 1)

    def _is_packed(self, name: str) -> bool:
        """Whether the kernels read a packed form of this weight, which holds its scales and zero points, too."""
        constant = self._constants.get(name)
        return constant is not None and isinstance(constant.key, tuple) and constant.key[0] == PACKED

    def _compute(self, step: Step) -> None:
        node = step.node
        kind = (node.domain, node.op_type)
        if kind in MATRIX_PRODUCTS:
            flops = _matrix_product(step, *MATRIX_PRODUCTS[kind])
        elif kind in PACKED_PRODUCTS:
            flops = _packed_product(step)
        elif kind in CONVOLUTIONS:
            flops = _convolution(step, CONVOLUTIONS[kind])
        elif kind in ATTENTIONS:
            flops = self._attention(step)
        elif node.op_type in NOT_COUNTED or _has_products_inside(node):
            flops = None
        else:
            return
        if flops is None:
            self.uncounted.add(node.op_type)
            return
        dtype = self._dtype(step)
        self.flops[dtype] = self.flops.get(dtype, 0) + flops

    def _attention(self, step: Step) -> int | None:
        given = attributes(step.node)
        sizes = attention_sizes(step.node.domain, step.node.op_type, given, step.inputs)
        if sizes is None:
            return None
        keys = sizes.keys
        window = int(given.get("local_window_size", -1))
        if window > 0:  # each token sees so many positions, itself among them
            keys = min(keys, window + sizes.queries - 1)
            self._windows |= dict.fromkeys([name for name in step.node.input[3:5] if name], window)
        flops = 2 * sizes.batch * sizes.heads * sizes.queries * keys * (sizes.width + sizes.value_width)
        if (step.node.domain, step.node.op_type) == (MICROSOFT, "Attention"):
            query, weights = step.inputs[0], step.inputs[1]
            assert query is not None
            assert weights is not None
            flops += 2 * (query.elements or 0) * (weights.shape or (0, 0))[1]
        return flops

    def _dtype(self, step: Step) -> str:
        """The data type that a product computes in. On a GPU, accuracy_level has no meaning."""
        node = step.node
        if node.op_type in INTEGER_PRODUCTS:
            return "int8"
        if node.op_type in ("MatMul", "Gemm") and all(name in self._dequantized for name in node.input[:2]):
            return "int8"  # ONNX Runtime fuses it with what quantizes its inputs
        first = step.inputs[0]
        dtype = _name(first.dtype) if first is not None else "float32"
        if node.op_type == "MatMulNBits" and self._device == "cpu":
            dtype = ACCURACY_LEVELS.get(int(attributes(node).get("accuracy_level", 0)), dtype)
        return "float32" if self._device == "cpu" and dtype in HALF else dtype


def _rows(constant: _Constant, table: Value, wanted: int | None) -> int:
    """Bytes of so many rows of a table, and at most all of it."""
    if wanted is None or not table.shape or not table.shape[0]:
        return constant.size_bytes
    return min(constant.size_bytes, constant.size_bytes * wanted // table.shape[0])


def _matrix_product(step: Step, left: int, right: int) -> int | None:
    given = attributes(step.node)
    shapes = [value.shape if value is not None else None for value in (step.inputs[left], step.inputs[right])]
    first, second = (factor(given, side, shape) for side, shape in zip("AB", shapes, strict=True))
    made = product_shape(first, second)
    return None if made is None or not first else 2 * prod(made) * first[-1]


def _packed_product(step: Step) -> int | None:
    given = attributes(step.node)
    first = step.inputs[0]
    if first is None or first.shape is None:
        return None
    return 2 * prod(first.shape[:-1]) * int(given["K"]) * int(given["N"])


def _convolution(step: Step, place: int) -> int | None:
    kernel = step.inputs[place]
    made = step.outputs[0].elements
    if made is None or kernel is None or not kernel.shape:
        return None
    return 2 * made * prod(kernel.shape[1:])  # [M, C / groups, …]


def _name(dtype: int) -> str:
    import onnx

    return {0: "float32", 1: "float32", 11: "float64"}.get(dtype) or str(onnx.TensorProto.DataType.Name(dtype)).lower()


def _subgraphs(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    return [graph for attribute in node.attribute for graph in (attribute.g, *attribute.graphs) if graph.node]


def _has_subgraph(node: onnx.NodeProto) -> bool:
    return bool(_subgraphs(node))


def _has_products_inside(node: onnx.NodeProto) -> bool:
    """Whether a branch or a loop has products: how often they run is not known."""
    counted = MATRIX_PRODUCTS.keys() | PACKED_PRODUCTS | CONVOLUTIONS.keys() | ATTENTIONS
    return any(
        (inner.domain, inner.op_type) in counted or _has_products_inside(inner)
        for graph in _subgraphs(node)
        for inner in graph.node
    )
