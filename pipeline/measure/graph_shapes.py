"""The shapes of a graph's values when its inputs have given sizes: nothing runs, and no weight is read.

ONNX's own shape inference takes one node after the other. What shapes are computed from (Shape, Gather, Concat …) is
evaluated, as those values are small and the sizes are known. ONNX Runtime's operators have rules of their own below.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    import onnx

LARGEST_VALUE = 4096
"""Elements of a value that is evaluated; larger ones have a shape alone."""

MICROSOFT = "com.microsoft"

Sizes = tuple[int, ...]


class Value(NamedTuple):
    """What is known of a value: ONNX's number of its data type, its shape and, where it is small, its contents."""

    dtype: int
    shape: Sizes | None = None
    contents: np.ndarray | None = None

    @property
    def elements(self) -> int | None:
        return None if self.shape is None else prod(self.shape)


class Step(NamedTuple):
    """A node with what is known of its inputs (None: left out) and outputs."""

    node: onnx.NodeProto
    inputs: Sequence[Value | None]
    outputs: Sequence[Value]


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    from onnx import helper

    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def steps(graph: onnx.GraphProto, opsets: Mapping[str, int], known: Mapping[str, Value]) -> Iterator[Step]:
    """The nodes of the main graph in their order. `known` are its inputs and initializers.

    A shape that cannot be told is None, and so are those that follow from it.
    """
    values = dict(known)
    for node in graph.node:
        inputs = [values.get(name, Value(0)) if name else None for name in node.input]
        outputs = _outputs(node, inputs, opsets)
        values |= {name: value for name, value in zip(node.output, outputs, strict=True) if name}
        yield Step(node, inputs, outputs)


def _outputs(node: onnx.NodeProto, inputs: Sequence[Value | None], opsets: Mapping[str, int]) -> list[Value]:
    if node.op_type == "Shape" and not node.domain and inputs[0] is not None and inputs[0].shape is not None:
        return [_sizes(node, inputs[0].shape)]
    rule = RULES.get((node.domain, node.op_type))
    if rule is not None:
        found = rule(attributes(node), inputs) if inputs and inputs[0] is not None else []
        return [*found, *[Value(0)] * (len(node.output) - len(found))][: len(node.output)]
    outputs = _inferred(node, inputs, opsets)
    small = all(value.shape is not None and prod(value.shape) <= LARGEST_VALUE for value in outputs)
    told = bool(inputs) or node.op_type == "Constant"  # what has no inputs otherwise may be random
    if small and told and all(value is None or value.contents is not None for value in inputs):
        return _evaluated(node, inputs, opsets) or outputs
    return outputs


def _sizes(node: onnx.NodeProto, shape: Sizes) -> Value:
    import numpy as np
    import onnx

    given = attributes(node)
    part = shape[given.get("start", 0) : given.get("end")]
    return Value(onnx.TensorProto.INT64, (len(part),), np.array(part, np.int64))


def _inferred(node: onnx.NodeProto, inputs: Sequence[Value | None], opsets: Mapping[str, int]) -> list[Value]:
    """By the operator's schema; nothing is known of an operator that has none."""
    import onnx
    from onnx import defs, helper, numpy_helper, shape_inference

    unknown = [Value(0)] * len(node.output)
    pairs = {name: value for name, value in zip(node.input, inputs, strict=True) if name and value is not None}
    if any(not value.dtype for value in pairs.values()):
        return unknown
    try:
        schema = defs.get_schema(node.op_type, opsets.get(node.domain, 1), node.domain)
        found = shape_inference.infer_node_outputs(
            schema,
            node,
            {name: helper.make_tensor_type_proto(v.dtype, v.shape) for name, v in pairs.items()},
            {name: numpy_helper.from_array(v.contents) for name, v in pairs.items() if v.contents is not None},
            opset_imports=[helper.make_opsetid(domain, version) for domain, version in opsets.items()],
            ir_version=onnx.IR_VERSION,
        )
    except (defs.SchemaError, shape_inference.InferenceError, ValueError, TypeError):
        return unknown
    return [_known(found[name]) if name in found else Value(0) for name in node.output]


def _known(found: onnx.TypeProto) -> Value:
    tensor = found.tensor_type
    if not tensor.HasField("shape") or any(not size.HasField("dim_value") for size in tensor.shape.dim):
        return Value(tensor.elem_type)
    return Value(tensor.elem_type, tuple(size.dim_value for size in tensor.shape.dim))


def _evaluated(node: onnx.NodeProto, inputs: Sequence[Value | None], opsets: Mapping[str, int]) -> list[Value] | None:
    """The contents by ONNX's reference implementation; None where it cannot."""
    import numpy as np
    from onnx import helper
    from onnx.reference import ReferenceEvaluator

    given = {name: v.contents for name, v in zip(node.input, inputs, strict=True) if name and v is not None}
    domains = [helper.make_opsetid(domain, version) for domain, version in opsets.items()]
    try:
        results = [np.asarray(r) for r in ReferenceEvaluator(node, opsets=domains).run(None, given)]  # type: ignore[arg-type]
        return [Value(helper.np_dtype_to_tensor_dtype(r.dtype), r.shape, r) for r in results]
    except (RuntimeError, NotImplementedError, ValueError, TypeError, KeyError, IndexError):
        return None


# --- operators of ONNX Runtime ---------------------------------------------------------------------------------------

Rule = Callable[[dict[str, Any], Sequence[Value | None]], list[Value]]


def _shape_of(inputs: Sequence[Value | None], place: int) -> Sizes | None:
    value = inputs[place] if place < len(inputs) else None
    return None if value is None else value.shape


def _first(inputs: Sequence[Value | None]) -> Value:
    assert inputs[0] is not None
    return inputs[0]


def _like_first(given: dict[str, Any], inputs: Sequence[Value | None]) -> list[Value]:
    return [Value(_first(inputs).dtype, _first(inputs).shape)]


def _skip_norm(given: dict[str, Any], inputs: Sequence[Value | None]) -> list[Value]:
    """The normalized sum, two statistics, and the sum."""
    same = Value(_first(inputs).dtype, _first(inputs).shape)
    return [same, Value(0), Value(0), same]


def _columns(name: str) -> Rule:
    """A product whose columns an attribute counts."""

    def rule(given: dict[str, Any], inputs: Sequence[Value | None]) -> list[Value]:
        first = _first(inputs)
        return [Value(first.dtype, None if first.shape is None else (*first.shape[:-1], given[name]))]

    return rule


def _matrix_product(given: dict[str, Any], inputs: Sequence[Value | None]) -> list[Value]:
    left, right = (factor(given, side, _shape_of(inputs, i)) for i, side in enumerate("AB"))
    return [Value(1 if _first(inputs).dtype in (2, 3) else _first(inputs).dtype, product_shape(left, right))]


def factor(given: Mapping[str, Any], side: str, shape: Sizes | None) -> Sizes | None:
    """The shape of a factor as it enters the product, after the transposition that the node's attributes ask for."""
    if shape is None or not given.get(f"trans{side}") or len(shape) < 2:
        return shape
    return (*shape[:-2], shape[-1], shape[-2])


def product_shape(left: Sizes | None, right: Sizes | None) -> Sizes | None:
    """The shape of a matrix product as numpy's matmul gives it; None where a factor's is not known."""
    import numpy as np

    if not left or not right:
        return None
    rows, columns = left[-2:-1], right[-1:] if len(right) > 1 else ()
    try:
        outer = np.broadcast_shapes(left[:-2], right[:-2])
    except ValueError:
        return None
    return (*map(int, outer), *rows, *columns)


class AttentionSizes(NamedTuple):
    """What an attention works on: queries [B, heads, S, D] against T positions of keys, and values of its own width."""

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    width: int
    value_width: int


def attention_sizes(
    domain: str, op_type: str, given: Mapping[str, Any], inputs: Sequence[Value | None]
) -> AttentionSizes | None:
    """The sizes of an Attention, GroupQueryAttention or MultiHeadAttention node; None where a shape is not known."""
    query, key, value = (_shape_of(inputs, i) for i in range(3))
    if query is None:
        return None
    if not domain:  # ONNX's own: [B, S, heads x D] or [B, heads, S, D]; a past in inputs 4 and 5
        past = _shape_of(inputs, 4)
        if key is None or value is None:
            return None
        if len(query) == 3:
            heads, kv_heads = given["q_num_heads"], given["kv_num_heads"]
            batch, queries, keys = query[0], query[1], key[1]
            width, value_width = query[2] // heads, value[2] // kv_heads
        else:
            batch, heads, queries, width = query
            kv_heads, keys, value_width = key[1], key[2], value[3]
        return AttentionSizes(batch, heads, kv_heads, queries, keys + (past[2] if past else 0), width, value_width)
    heads = given["num_heads"]
    if op_type == "GroupQueryAttention":
        past = _shape_of(inputs, 3)
        kv_heads = given["kv_num_heads"]
        packed = len(inputs) < 2 or inputs[1] is None  # query, key and value in one
        width = query[2] // (heads + 2 * kv_heads) if packed else query[2] // heads
        return AttentionSizes(query[0], heads, kv_heads, query[1], query[1] + (past[2] if past else 0), width, width)
    if op_type == "MultiHeadAttention":
        past = _shape_of(inputs, 6)
        if len(query) == 5:  # [B, S, heads, 3, D]: query, key and value in one
            return AttentionSizes(query[0], heads, heads, query[1], query[1], query[4], query[4])
        if key is None:
            return None
        keys = key[2] if len(key) == 4 else key[1]
        width = query[2] // heads
        value_width = width if value is None else value[-1] if len(value) == 4 else value[2] // heads
        return AttentionSizes(query[0], heads, heads, query[1], keys + (past[2] if past else 0), width, value_width)
    weights, past = key, _shape_of(inputs, 4)  # com.microsoft.Attention: input [B, S, I], weights [I, 3 x heads x D]
    if weights is None:
        return None
    widths = given.get("qkv_hidden_sizes") or [weights[1] // 3] * 3
    keys = query[1] + (past[3] if past else 0)
    return AttentionSizes(query[0], heads, heads, query[1], keys, widths[0] // heads, widths[2] // heads)


def _attention(op_type: str) -> Rule:
    def rule(given: dict[str, Any], inputs: Sequence[Value | None]) -> list[Value]:
        sizes = attention_sizes(MICROSOFT, op_type, given, inputs)
        if sizes is None:
            return []
        dtype = _first(inputs).dtype
        made = Value(dtype, (sizes.batch, sizes.queries, sizes.heads * sizes.value_width))
        if op_type == "Attention":
            return [made, Value(dtype, (2, sizes.batch, sizes.kv_heads, sizes.keys, sizes.width))]
        present = Value(dtype, (sizes.batch, sizes.kv_heads, sizes.keys, sizes.width))
        return [made, present, present]

    return rule


def _block_lookup(given: dict[str, Any], inputs: Sequence[Value | None]) -> list[Value]:
    """GatherBlockQuantized: rows of a table whose codes may be packed two to a byte, in the scales' data type."""
    table, places, scales = (_shape_of(inputs, i) for i in range(3))
    third = inputs[2] if len(inputs) > 2 else None
    if table is None or places is None or scales is None or third is None:
        return []
    packed = 8 // given.get("bits", 4) if _first(inputs).dtype == 2 else 1
    return [Value(third.dtype, (*places, *table[1:-1], table[-1] * packed))]


RULES: dict[tuple[str, str], Rule] = {
    **dict.fromkeys(
        [
            ("", "SimplifiedLayerNormalization"),
            *(
                (MICROSOFT, name)
                for name in ("QuickGelu", "FastGelu", "Gelu", "BiasGelu", "RotaryEmbedding", "GemmaRotaryEmbedding")
            ),
        ],
        _like_first,
    ),
    (MICROSOFT, "SkipLayerNormalization"): _skip_norm,
    (MICROSOFT, "SkipSimplifiedLayerNormalization"): _skip_norm,
    (MICROSOFT, "MatMulNBits"): _columns("N"),
    (MICROSOFT, "MatMulBnb4"): _columns("N"),
    (MICROSOFT, "DynamicQuantizeMatMul"): _matrix_product,
    (MICROSOFT, "MatMulIntegerToFloat"): _matrix_product,
    (MICROSOFT, "FusedMatMul"): _matrix_product,
    (MICROSOFT, "TransposeMatMul"): _matrix_product,
    (MICROSOFT, "GroupQueryAttention"): _attention("GroupQueryAttention"),
    (MICROSOFT, "MultiHeadAttention"): _attention("MultiHeadAttention"),
    (MICROSOFT, "Attention"): _attention("Attention"),
    (MICROSOFT, "GatherBlockQuantized"): _block_lookup,
}
"""Shapes of operators for which ONNX has no schema."""
