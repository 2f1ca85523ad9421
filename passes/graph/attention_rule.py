"""Attention over a growing cache as one operator: GroupQueryAttention, its rotary embedding inside.

An exported layer is RotaryEmbedding, the Concat of past and new keys and values, their repetition for the query heads
that share them, a mask made of comparisons, Attention, and the Transposes and Reshapes around these. ONNX Runtime's
operator is all of it: it takes the products' outputs [B, S, heads · size] as they are, appends to a cache that may be
one buffer, and knows causality, windows and soft capping.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from passes.graph.attention_mask import CausalMask, MaskInputs, causal_mask
from passes.graph.fusion import MICROSOFT, NotFusedError, Rule, describe, int64_constant, put_in_place
from passes.graph.rotary_table import rotary_tables

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

HEADS_LAST = (0, 2, 1, 3)
TABLE_WIDTH_STEP = 8
"""The operator takes tables whose width is a multiple of this."""


@dataclass
class Surroundings:
    """What all layers of a graph share, made once, when the first layer needs it."""

    inputs: MaskInputs
    max_length: int
    opsets: Mapping[str, int]
    add_table: Callable[[str, np.ndarray], ir.Value]
    """(name, table) -> a new initializer."""
    masks: dict[ir.Value, CausalMask | NotFusedError] = field(default_factory=dict)
    tables: dict[tuple[ir.Value, ir.Value], tuple[ir.Value, ir.Value] | NotFusedError] = field(default_factory=dict)
    lengths: tuple[ir.Value, ir.Value] | None = None
    rotary_outside: list[tuple[ir.Node, str]] = field(default_factory=list)
    """Attention nodes whose rotary embedding the operator could not take in, and why."""

    def mask_of(self, value: ir.Value) -> CausalMask:
        """Raises: NotFusedError where it is not causal."""
        if value not in self.masks:
            try:
                self.masks[value] = causal_mask(value, self.inputs, length=self.max_length, opsets=self.opsets)
            except NotFusedError as refusal:
                self.masks[value] = refusal
        found = self.masks[value]
        if isinstance(found, NotFusedError):
            raise found
        return found

    def tables_of(self, cosines: ir.Value, sines: ir.Value) -> tuple[ir.Value, ir.Value]:
        """The initializers float [max_length, width] for these values.

        Raises: NotFusedError where there is no table for them that the operator takes.
        """
        key = (cosines, sines)
        if key not in self.tables:
            try:
                made = rotary_tables(cosines, sines, self.inputs.positions, length=self.max_length, opsets=self.opsets)
                if made[0].shape[1] % TABLE_WIDTH_STEP:
                    raise NotFusedError(
                        f"it turns {2 * made[0].shape[1]} values of a head, no multiple of {2 * TABLE_WIDTH_STEP}"
                    )
                suffix = f".{len(self.tables)}" if self.tables else ""
                names = (f"rotary{suffix}.cos", f"rotary{suffix}.sin")
                first, second = (self.add_table(name, table) for name, table in zip(names, made, strict=True))
                self.tables[key] = first, second
            except NotFusedError as refusal:
                self.tables[key] = refusal
        found = self.tables[key]
        if isinstance(found, NotFusedError):
            raise found
        return found

    def lengths_of(self, graph: ir.Graph) -> tuple[ir.Value, ir.Value]:
        """(position of each sequence's last token int32 [B], positions of the whole step int32 [1])."""
        import onnx_ir as ir

        if self.lengths is None:
            mask = self.inputs.mask
            one, axis = (
                int64_constant(graph, f"attention.{name}", [value]) for name, value in (("one", 1), ("axis", 1))
            )
            filled = ir.node("ReduceSum", [mask, axis], {"keepdims": 0}, name="attention.filled")
            last = ir.node("Sub", [filled.outputs[0], one], name="attention.last")
            last32 = ir.node("Cast", [last.outputs[0]], {"to": ir.DataType.INT32}, name="attention.seqlens_k")
            total = ir.node("Shape", [mask], {"start": 1, "end": 2}, name="attention.total")
            total32 = ir.node("Cast", [total.outputs[0]], {"to": ir.DataType.INT32}, name="attention.total_int32")
            nodes = [filled, last, last32, total, total32]
            for node, dtype, shape in (
                (filled, ir.DataType.INT64, ["batch"]),
                (last, ir.DataType.INT64, ["batch"]),
                (last32, ir.DataType.INT32, ["batch"]),
                (total, ir.DataType.INT64, [1]),
                (total32, ir.DataType.INT32, [1]),
            ):
                describe(node.outputs[0], name=f"{node.name}.value", dtype=dtype, shape=shape)
            graph.insert_before(graph[0], nodes)
            self.lengths = last32.outputs[0], total32.outputs[0]
        return self.lengths


@dataclass(frozen=True)
class Cached:
    """Keys or values of a layer: a Concat of what the cache holds and what is new, [B, kv_heads, T, size]."""

    concat: ir.Node
    past: ir.Value
    new: ir.Value

    @property
    def present(self) -> ir.Value:
        return self.concat.outputs[0]


@dataclass(frozen=True)
class Heads:
    """Queries or keys before their rotary embedding, [B, heads, S, size]."""

    value: ir.Value
    cosines: ir.Value | None = None
    sines: ir.Value | None = None
    interleaved: int = 0


def group_query_attention() -> Rule:
    return Rule("group_query_attention", _attention_nodes, _fuse)


def _attention_nodes(graph: ir.Graph) -> list[ir.Node]:
    return [node for node in graph if node.op_type == "Attention" and not node.domain]


def _fuse(node: ir.Node, around: Surroundings) -> None:
    import onnx_ir as ir

    query, keys, values, mask = _operands(node)
    key_cache, value_cache = _cached(keys, node), _cached(values, node)
    heads, size = _sizes(query, key_cache.past, value_cache.past)
    kv_heads = _static(key_cache.past, 1)
    kind = around.mask_of(mask)
    queries, new_keys = _before_rotary(query), _before_rotary(key_cache.new)
    tables: tuple[ir.Value, ...] = ()
    if queries.cosines is not None and queries.sines is not None:
        try:
            if (queries.cosines, queries.sines) != (new_keys.cosines, new_keys.sines):
                raise NotFusedError("its queries and keys are turned by different angles")
            if size % (2 * TABLE_WIDTH_STEP):
                raise NotFusedError(f"a head has {size} values, no multiple of {2 * TABLE_WIDTH_STEP}")
            tables = around.tables_of(queries.cosines, queries.sines)
        except NotFusedError as refusal:
            around.rotary_outside.append((node, str(refusal)))
    if not tables:  # embedded before the operator, or not at all
        queries, new_keys = Heads(query), Heads(key_cache.new)
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    last, total = around.lengths_of(graph)
    made: list[ir.Node] = []
    flat = [
        _joined(value, count, size, graph, made)
        for value, count in ((queries.value, heads), (new_keys.value, kv_heads), (value_cache.new, kv_heads))
    ]
    attributes: dict[str, int | float] = {
        "num_heads": heads,
        "kv_num_heads": kv_heads,
        "do_rotary": int(bool(tables)),
        "rotary_interleaved": queries.interleaved if tables else 0,
        "local_window_size": -1 if kind.window is None else kind.window,
        "scale": node.attributes.get_float("scale", 0.0) or float(size**-0.5),
        "softcap": node.attributes.get_float("softcap", 0.0),
    }
    fused = ir.node(
        "GroupQueryAttention",
        [*flat, key_cache.past, value_cache.past, last, total, *tables],
        attributes,
        domain=MICROSOFT,
        num_outputs=3,
        name=f"{node.name}.group_query",
        version=1,
    )
    made.append(fused)
    result = _split_by_heads(node, fused.outputs[0], heads, size, made=made)
    put_in_place(
        node,
        made,
        [result, (key_cache.present, fused.outputs[1]), (value_cache.present, fused.outputs[2])],
    )


def _operands(node: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value, ir.Value]:
    """Raises: NotFusedError where the node does more than the operator can."""
    query, keys, values, mask, *others = [*node.inputs, None, None, None, None][:6]
    if query is None or keys is None or values is None:
        raise NotFusedError("it lacks an operand")
    if any(others) or len([output for output in node.outputs if output.uses() or output.is_graph_output()]) != 1:
        raise NotFusedError("it keeps a cache of its own, or gives out its scores")
    if mask is None or node.attributes.get_int("is_causal", False):
        raise NotFusedError("it has no mask that says what is past")
    return query, keys, values, mask


def _cached(value: ir.Value, attention: ir.Node) -> Cached:
    """The cache behind an operand [B, heads, T, size], seen through its repetition for several query heads.

    Raises: NotFusedError where there is none, or others read it.
    """
    chain: list[ir.Node] = []
    concat = value.producer()
    while concat is not None and concat.op_type in ("Reshape", "Expand", "Unsqueeze", "Identity"):
        chain.append(concat)
        assert concat.inputs[0] is not None
        concat = concat.inputs[0].producer()
    if concat is None or concat.op_type != "Concat" or len(concat.inputs) != 2:
        raise NotFusedError("its keys or values are no Concat of a cache and what is new")
    past, new = concat.inputs
    present = concat.outputs[0]
    if past is None or new is None or not past.is_graph_input() or not present.is_graph_output():
        raise NotFusedError("its cache is no input and output of the graph")
    if concat.attributes.get_int("axis", 0) not in (2, -2):
        raise NotFusedError("its cache does not grow along the third axis")
    if any(user not in (*chain, attention) for user in present.consumers()):
        raise NotFusedError("others read its keys or values, too")
    if chain and not _repeats_heads(chain, present, value):
        raise NotFusedError("its keys or values are changed on the way to it")
    return Cached(concat, past, new)


def _repeats_heads(chain: Sequence[ir.Node], present: ir.Value, value: ir.Value) -> bool:
    """Whether [B, kv_heads, T, size] becomes [B, kv_heads, 1, T, size], is expanded there, and is reshaped to 4-D."""
    operators = [node.op_type for node in reversed(chain) if node.op_type != "Identity"]
    if operators != ["Unsqueeze", "Expand", "Reshape"]:
        return False
    middle = next(node for node in chain if node.op_type == "Expand").outputs[0]
    lone = next(node for node in chain if node.op_type == "Unsqueeze").outputs[0]
    shapes = [v.shape for v in (present, lone, middle, value)]
    if any(shape is None for shape in shapes):
        return False
    before, one, many, after = (list(shape) for shape in shapes if shape is not None)
    if len(one) != 5 or one[2] != 1 or len(many) != 5 or len(after) != 4:
        return False
    repeats = many[2]
    return isinstance(repeats, int) and isinstance(before[1], int) and after[1] == before[1] * repeats


def _sizes(query: ir.Value, past_keys: ir.Value, past_values: ir.Value) -> tuple[int, int]:
    """(query heads, values of a head).

    Raises: NotFusedError where they are not known, or the cache has others.
    """
    heads, size = _static(query, 1), _static(query, 3)
    for past in (past_keys, past_values):
        if _static(past, 3) != size:
            raise NotFusedError(f"its heads have {size} values and those of its cache {_static(past, 3)}")
    if _static(past_keys, 1) != _static(past_values, 1) or heads % _static(past_keys, 1):
        raise NotFusedError(f"its {heads} heads do not share {_static(past_keys, 1)} evenly")
    return heads, size


def _static(value: ir.Value, axis: int) -> int:
    """Raises: NotFusedError where the size along that axis is not a number."""
    size = value.shape[axis] if value.shape is not None and len(value.shape) == 4 else None
    if not isinstance(size, int):
        raise NotFusedError(f"the graph does not say how large {value.name} is along axis {axis}")
    return size


def _before_rotary(value: ir.Value) -> Heads:
    """The heads before their rotary embedding, whole or of the first values of each head; as they are without one."""
    node = value.producer()
    if node is not None and node.op_type == "RotaryEmbedding" and not node.domain:
        return _embedded(node, value)
    if node is None or node.op_type != "Concat" or len(node.inputs) != 2:
        return Heads(value)
    return _partly_embedded(node, value) or Heads(value)


def _partly_embedded(concat: ir.Node, value: ir.Value) -> Heads | None:
    """Concat(RotaryEmbedding(x[..., :n]), x[..., n:]): x and how its first values are turned; None for another."""
    turned, kept = (part.producer() if part is not None else None for part in concat.inputs)
    if turned is None or kept is None or turned.op_type != "RotaryEmbedding" or kept.op_type != "Slice":
        return None
    begin = turned.inputs[0].producer() if turned.inputs[0] is not None else None
    source = kept.inputs[0]
    if begin is None or begin.op_type != "Slice" or source is None or begin.inputs[0] is not source:
        return None
    first, second = _slice_of_heads(begin), _slice_of_heads(kept)
    size = value.shape[3] if value.shape is not None else None
    if first is None or second is None or not isinstance(size, int):
        return None
    meet = first[0] == 0 and first[1] == second[0] and second[1] >= size
    embedded = _embedded(turned, value)
    if not meet or concat.attributes.get_int("axis", 0) not in (3, -1) or embedded.cosines is None:
        return None
    return Heads(source, embedded.cosines, embedded.sines, embedded.interleaved)


def _embedded(node: ir.Node, value: ir.Value) -> Heads:
    """What a RotaryEmbedding of cosines [B, S, width] embeds; `value` itself where it has tables already."""
    source, cosines, sines = node.inputs[:3]
    tables = len(node.inputs) > 3 and node.inputs[3] is not None
    if (
        tables
        or node.attributes.get_int("rotary_embedding_dim", False)
        or source is None
        or len(source.shape or ()) != 4
    ):
        return Heads(value)
    return Heads(source, cosines, sines, node.attributes.get_int("interleaved", 0))


def _slice_of_heads(node: ir.Node) -> tuple[int, int] | None:
    """(start, end) of a Slice along the last of four axes; None where it is another."""
    arrays = [
        value.const_value.numpy() if value is not None and value.const_value is not None else None
        for value in node.inputs[1:]
    ]
    if len(arrays) < 3 or any(array is None or array.size != 1 for array in arrays):
        return None
    start, end, axis, *step = (int(array.reshape(-1)[0]) for array in arrays if array is not None)
    return (start, end) if axis in (3, -1) and step in ([], [1]) else None


def _joined(value: ir.Value, heads: int, size: int, graph: ir.Graph, made: list[ir.Node]) -> ir.Value:
    """Heads [B, heads, S, size] as [B, S, heads · size]: what they were split from, or else new nodes in `made`."""
    import onnx_ir as ir

    node = value.producer()
    if node is not None and node.op_type == "Transpose" and tuple(node.attributes.get_ints("perm", ())) == HEADS_LAST:
        by_position = node.inputs[0]
        assert by_position is not None
    else:
        turned = ir.node("Transpose", [value], {"perm": list(HEADS_LAST)}, name=f"{value.name}.by_position")
        shape = ["batch", "sequence", heads, size]
        by_position = describe(turned.outputs[0], name=f"{value.name}.by_position", dtype=value.dtype, shape=shape)
        made.append(turned)
    split = by_position.producer()
    whole = split.inputs[0] if split is not None and split.op_type == "Reshape" else None
    if whole is not None and whole.shape is not None and len(whole.shape) == 3 and whole.shape[2] == heads * size:
        return whole
    wanted = int64_constant(graph, f"attention.joined_{heads}_{size}", [0, 0, heads * size])
    join = ir.node("Reshape", [by_position, wanted], {"allowzero": 0}, name=f"{value.name}.joined")
    made.append(join)
    name, width = f"{value.name}.joined", heads * size
    return describe(join.outputs[0], name=name, dtype=value.dtype, shape=["batch", "sequence", width])


def _split_by_heads(
    attention: ir.Node, fused: ir.Value, heads: int, size: int, *, made: list[ir.Node]
) -> tuple[ir.Value, ir.Value]:
    """(what is replaced, by what): the heads joined again after the attention, or, where they are not, the heads."""
    import onnx_ir as ir

    value, graph = attention.outputs[0], attention.graph
    assert isinstance(graph, ir.Graph)
    describe(fused, name=f"{value.name}.joined", dtype=value.dtype, shape=["batch", "sequence", heads * size])
    user = _only_user(value)
    while user is not None and user.op_type == "Reshape" and _keeps_shape(user, heads, size):
        value = user.outputs[0]
        user = _only_user(value)
    if user is not None and user.op_type == "Transpose" and tuple(user.attributes.get_ints("perm", ())) == HEADS_LAST:
        join = _only_user(user.outputs[0])
        if join is not None and join.op_type == "Reshape":
            whole = join.outputs[0]
            if whole.shape is not None and len(whole.shape) == 3 and whole.shape[2] == heads * size:
                return whole, fused
    shape = int64_constant(graph, f"attention.split_{heads}_{size}", [0, 0, heads, size])
    split = ir.node("Reshape", [fused, shape], {"allowzero": 0}, name=f"{attention.name}.split")
    parts = ["batch", "sequence", heads, size]
    describe(split.outputs[0], name=f"{fused.name}.split", dtype=fused.dtype, shape=parts)
    turned = ir.node("Transpose", [split.outputs[0]], {"perm": list(HEADS_LAST)}, name=f"{attention.name}.turned")
    made += [split, turned]
    return attention.outputs[0], turned.outputs[0]


def _only_user(value: ir.Value) -> ir.Node | None:
    users = value.consumers()
    return users[0] if len(users) == 1 and not value.is_graph_output() else None


def _keeps_shape(node: ir.Node, heads: int, size: int) -> bool:
    """Whether a Reshape leaves [B, heads, S, size] as it is."""
    before, after = (value.shape if value is not None else None for value in (node.inputs[0], node.outputs[0]))
    return before is not None and after is not None and len(after) == 4 and list(before) == list(after)
