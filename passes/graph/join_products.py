"""Products in blocked weights (MatMulNBits) that read one value as one product: fewer, larger kernels."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from passes.graph.agreement import check_agreement, outputs_of
from passes.graph.first_layers import keep_first_layers
from passes.graph.fusion import (
    MICROSOFT,
    NotFusedError,
    Rule,
    apply_rule,
    describe,
    int64_constant,
    put_in_place,
)
from passes.graph.offline import open_session, session_options
from passes.graph.weights_aside import execution_of_graph
from passes.quantize.products import register, remove_unused
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
    new_tensor,
    save_onnx,
)

if TYPE_CHECKING:
    import onnx_ir as ir

TOLERANCE = 1e-3
"""Largest difference from the graph before, as a share of an output's standard deviation: the sums are the same."""

PACKED = 1.1
"""Memory that ONNX Runtime takes for the packed form of weights, as a share of their bytes."""

COMPARED_BYTES = 200 * 10**6
FIRST_LAYERS = 3
"""Weights of more than COMPARED_BYTES are compared by what the first layers compute."""

LIBRARIES_BYTES = 145 * 10**6
"""Memory of the pass's process before any weight is read: Python, onnx_ir and ONNX Runtime. Measured."""

PRODUCT = "MatMulNBits"
ORDER = 4
"""The place of a MatMulNBits' input that gives its weights an order."""

VALUE = 2
"""A GroupQueryAttention's first inputs are queries, keys and values; packed, all three are in the first."""


class JoinProducts(Pass):
    """Make one MatMulNBits of those that read one value: queries, keys and values; a gated MLP's two."""

    name, version = "join_products", 1
    accepts, produces = frozenset({"onnx"}), "onnx"
    libraries = ("onnxruntime", "onnx", "onnx-ir")
    examples = (Example(after=({"pass": "export_onnx", "verify": False}, "fuse_transformer", "quantize_weights")),)

    class Params(PassParams):
        attention: bool = Field(
            True, description="join queries, keys and values, which GroupQueryAttention takes as one"
        )
        others: bool = Field(True, description="join other products of one value, and split their result")
        verify: bool = Field(True, description="run the graph before and after on random tokens and compare")

    def run(self, artifact: Artifact, params: Params, context: PassContext) -> Artifact:
        """Join what can be, count it, compare.

        Raises: PipelineError where the graph has no MatMulNBits, or the result computes something else.
        """
        model = load_onnx(artifact)
        if not any(is_product(node) for node in model.graph):
            raise PipelineError(
                "the graph has no MatMulNBits to join",
                hint="quantize_weights makes them. Float weights stay apart: joining them would copy the whole model",
            )
        context.progress(0.1, "joining")
        joiner = Joiner(model, context)
        rules = [packed_attention(joiner)] * params.attention + [products_of_one_value(joiner)] * params.others
        for rule in rules:
            outcome = apply_rule(rule, model.graph, None)
            context.count_rule(outcome.rule, outcome.done, outcome.of)
            context.logger.info("%s: %d of %d", outcome.rule, outcome.done, outcome.of)
            for left in outcome.left:
                context.logger.info("%s: %s is left as it is: %s", outcome.rule, left.node, left.reason)
            remove_unused(model)
        if joiner.made:
            context.output.pack_path()  # which flushes what was written to it
        if params.verify and joiner.made:
            context.progress(0.7, "comparing")
            _compare(artifact, model.clone(), context)  # a copy, for the comparison may cut it
        context.progress(0.9, "writing")
        return save_onnx(model, context.output, like=artifact, execution=execution_of_graph(artifact))

    @classmethod
    def predict(cls, params: Params, model: ModelSize) -> Prediction:
        """Weights keep their bits; those of all layers, at most, are written again. Comparing packs what it runs."""
        packed = model.linear.size_bytes
        if packed > COMPARED_BYTES and model.decoder is not None:
            packed = packed * FIRST_LAYERS // model.decoder.layers
        return Prediction(
            model=model,
            conversion_bytes=LIBRARIES_BYTES + 2 * model.largest + (round(PACKED * packed) if params.verify else 0),
            written_bytes=model.linear.size_bytes,
        )


def _compare(artifact: Artifact, joined: ir.Model, context: PassContext) -> None:
    """Run the graph before and the one with joined products, one after the other.

    ONNX Runtime holds a packed copy of the weights that it runs. Where that is large, what the first layers put into
    their cache is compared. Raises: PipelineError where they differ.
    """
    faces = artifact.interface, artifact.interface
    graphs = load_onnx(artifact), joined
    cache = artifact.interface.cache
    if cache is not None and cache.layers > FIRST_LAYERS and _code_bytes(joined) > COMPARED_BYTES:
        faces = tuple(keep_first_layers(graph, artifact.interface, FIRST_LAYERS) for graph in graphs)  # type: ignore[assignment]
        context.logger.info("the weights are large: the first %d layers are compared", FIRST_LAYERS)
    options = session_options(context.threads)
    expected, given = (outputs_of(open_session(g, options), face) for g, face in zip(graphs, faces, strict=True))
    check_agreement(
        expected,
        given,
        context,
        tolerance=TOLERANCE,
        what="the graph with joined products",
        hint="this is a fault of the pass; leave it out",
    )


def _code_bytes(model: ir.Model) -> int:
    weights = [node.inputs[1].const_value for node in model.graph if is_product(node) and node.inputs[1] is not None]
    return sum(weight.nbytes for weight in weights if weight is not None)


def is_product(node: ir.Node | None) -> bool:
    return node is not None and node.op_type == PRODUCT and node.domain == MICROSOFT


@dataclass
class Joiner:
    """Makes the joined products of one model; their weights are written one product at a time."""

    model: ir.Model
    context: PassContext
    made: set[ir.Node] = field(default_factory=set)

    def join(self, products: Sequence[ir.Node], name: str) -> ir.Node:
        """A product that yields the outputs of these side by side, in no graph yet.

        Raises: NotFusedError where they differ in more than how many outputs they have.
        """
        import onnx_ir as ir

        first = products[0]
        settings = {_settings(node) for node in products}
        if len(settings) > 1:
            raise NotFusedError("its weights differ in bits, block size, accuracy level or in having zero points")
        places = [place for place in range(1, len(first.inputs)) if first.inputs[place] is not None]
        if ORDER in places:
            raise NotFusedError("its weights have an order of their own")
        if any(node.inputs[place].const_value is None for node in products for place in places):  # type: ignore[union-attr]
            raise NotFusedError("its weights are computed")
        weights = [None] * (len(first.inputs) - 1)
        for place in places:
            weights[place - 1] = self.side_by_side([node.inputs[place] for node in products], _rows(products))  # type: ignore[misc,call-overload]
        attributes = {key: value.value for key, value in first.attributes.items()} | {"N": sum(_rows(products))}
        product = ir.node(PRODUCT, [first.inputs[0], *weights], attributes, domain=MICROSOFT, name=name)
        self.made.add(product)
        return product

    def side_by_side(self, parts: Sequence[ir.Value], rows: Sequence[int]) -> ir.Value:
        """An initializer of these one after the other, each with so many rows of its own."""
        import numpy as np

        arrays = []
        for part, count in zip(parts, rows, strict=True):
            assert part.const_value is not None
            arrays.append(part.const_value.numpy().reshape(count, -1))
        shape = parts[0].const_value.shape.numpy()[1:]  # type: ignore[union-attr]
        together = np.concatenate(arrays)
        label = _joined_name([str(part.name) for part in parts])
        while label in self.model.graph.initializers:
            label += "_"
        array = together.reshape(sum(rows), *shape) if shape else together.reshape(-1)
        return register(self.model, label, new_tensor(self.context.output, label, array))


def packed_attention(joiner: Joiner) -> Rule:
    """Queries, keys and values of one product, which GroupQueryAttention takes apart where it reads them."""

    def candidates(graph: ir.Graph) -> list[ir.Node]:
        return [
            node
            for node in graph
            if node.op_type == "GroupQueryAttention" and node.domain == MICROSOFT and all(node.inputs[: VALUE + 1])
        ]

    def rewrite(attention: ir.Node, _: object) -> None:
        import onnx_ir as ir

        found = [_product_behind(value) for value in attention.inputs[: VALUE + 1]]
        products = [product for product, _ in found if product is not None]
        if len(products) < 3 or len({node.inputs[0] for node in products}) > 1:
            raise NotFusedError("its queries, keys and values are no products of one value")
        if any(len(_only_path(node)) > 1 for node in products):
            raise NotFusedError("another node reads its queries, keys or values")
        biases = [bias for _, bias in found if bias is not None]
        if len(biases) not in (0, 3):
            raise NotFusedError("only some of its queries, keys and values have a bias")
        name = f"{products[0].name or 'attention'}.packed"
        product = joiner.join(products, name)
        rows = _rows(products)
        value = _described_like(product.outputs[0], products[0].outputs[0], f"{name}.value", sum(rows))
        nodes = [product]
        if biases:
            add = ir.node("Add", [value, joiner.side_by_side(biases, rows)], name=f"{name}.add")
            value = _described_like(add.outputs[0], products[0].outputs[0], f"{name}.biased", sum(rows))
            nodes.append(add)
        packed = ir.node(
            attention.op_type,
            [value, None, None, *attention.inputs[VALUE + 1 :]],
            {key: attribute.value for key, attribute in attention.attributes.items()},
            domain=attention.domain,
            num_outputs=len(attention.outputs),
            name=attention.name,
        )
        for old, new in zip(attention.outputs, packed.outputs, strict=True):
            describe(new, name=str(old.name), dtype=old.dtype, shape=list(old.shape or ()))
            new.shape = old.shape
        put_in_place(attention, [*nodes, packed], list(zip(attention.outputs, packed.outputs, strict=True)))
        assert attention.graph is not None
        attention.graph.remove(attention, safe=True)

    return Rule("packed_attention", candidates, rewrite)


def products_of_one_value(joiner: Joiner) -> Rule:
    """Products of one value as one product, whose result is split."""

    def candidates(graph: ir.Graph) -> list[ir.Node]:
        return [node for node in graph if _siblings(node, joiner.made)[:1] == [node]]

    def rewrite(first: ir.Node, _: object) -> None:
        import onnx_ir as ir

        products = _siblings(first, joiner.made)
        name = f"{first.name or 'product'}.joined"
        product = joiner.join(products, name)
        rows = _rows(products)
        _described_like(product.outputs[0], first.outputs[0], f"{name}.value", sum(rows))
        graph = first.graph
        assert graph is not None
        widths = int64_constant(graph, "rows_" + "_".join(map(str, rows)), rows)
        split = ir.node(
            "Split", [product.outputs[0], widths], {"axis": -1}, num_outputs=len(rows), name=f"{name}.split"
        )
        for key, value in first.metadata_props.items():
            product.metadata_props[key] = split.metadata_props[key] = value
        old = [node.outputs[0] for node in products]
        # what reads the value comes after all of them, and none of them needs another
        ir.convenience.replace_nodes_and_values(graph, first, products, [product, split], old, split.outputs)

    return Rule("products_of_one_value", candidates, rewrite)


def _siblings(product: ir.Node, apart: Set[ir.Node]) -> list[ir.Node]:
    """All products of the value that this one reads but those `apart`, in the graph's order; none where it is alone."""
    value = product.inputs[0] if is_product(product) else None
    if value is None or product.graph is None:
        return []
    found = {node for node, place in value.uses() if place == 0 and is_product(node) and node.graph is product.graph}
    return [node for node in product.graph if node in found - apart] if len(found - apart) > 1 else []


def _joined_name(names: Sequence[str]) -> str:
    """layers.0.q_proj.weight, layers.0.k_proj.weight -> layers.0.q_proj+k_proj.weight."""
    parts = [name.split(".") for name in names]
    if len({len(part) for part in parts}) == 1:
        columns = [tuple(dict.fromkeys(column)) for column in zip(*parts, strict=True)]
        if sum(len(column) > 1 for column in columns) == 1:
            return ".".join("+".join(column) for column in columns)
    return "+".join(names)


def _product_behind(value: ir.Value | None) -> tuple[ir.Node | None, ir.Value | None]:
    """The product that yields the value, and the constant bias [N] that is added to it."""
    node = value.producer() if value is not None else None
    if node is None or is_product(node):
        return node, None
    if node.op_type != "Add" or node.domain:
        return None, None
    for place in range(2):
        given, bias = node.inputs[place], node.inputs[1 - place]
        inner = given.producer() if given is not None else None
        tensor = bias.const_value if bias is not None else None
        if inner is not None and is_product(inner) and tensor is not None and _is_bias(tensor, inner):
            return inner, bias
    return None, None


def _is_bias(tensor: ir.TensorProtocol, product: ir.Node) -> bool:
    """Whether it has a number for each of the product's outputs: one for all of them cannot be put side by side."""
    return list(tensor.shape.numpy()) == _rows([product])


def _only_path(product: ir.Node) -> list[ir.Node]:
    """What reads the product's result, or that of the Add of its bias, if nothing else reads it."""
    readers = [node for node, _ in product.outputs[0].uses()]
    if len(readers) == 1 and readers[0].op_type == "Add":
        return [node for node, _ in readers[0].outputs[0].uses()]
    return readers


def _settings(product: ir.Node) -> tuple[object, ...]:
    """All but the number of rows that two products must have in common."""
    given = tuple(value is not None for value in product.inputs[1:])
    types = tuple(value.dtype for value in product.inputs if value is not None)
    attributes = sorted((key, value.value) for key, value in product.attributes.items() if key != "N")
    while given and not given[-1]:
        given = given[:-1]
    return given, types, tuple(attributes)


def _rows(products: Sequence[ir.Node]) -> list[int]:
    return [node.attributes.get_int("N", 0) for node in products]


def _described_like(value: ir.Value, other: ir.Value, name: str, width: int) -> ir.Value:
    """Name a value that is as the other but in its last dimension."""
    shape = [*other.shape[:-1], width] if other.shape is not None else None
    value.name = name
    return describe(value, name=name, dtype=other.dtype, shape=shape) if shape is not None else value
