"""Where a graph multiplies by constant weights or looks tokens up in them: found, named, chosen, replaced."""

from __future__ import annotations

import difflib
from collections import deque
from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from pipeline import Artifact, PassContext, PipelineError, new_tensor

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

MICROSOFT = "com.microsoft"
"""Domain of ONNX Runtime's own operators."""

SHOWN = 3
"""Names that an error shows as examples."""


@dataclass(frozen=True)
class ConstantMatrix:
    """A float matrix as a graph computes it from one that is stored: cast, transposed, its input channels scaled."""

    weight: ir.Value
    transposed: bool
    scale: ir.Value | None = None
    """Factors of the K input channels, an initializer of K values."""


class ScaledColumns:
    """A weight [N, K] times factors [K], computed row by row as it is asked for: a whole copy is never made unasked."""

    def __init__(self, weight: np.ndarray, factors: np.ndarray) -> None:
        import numpy as np

        self._weight, self._factors = weight, factors.reshape(-1).astype(np.float32)
        self.shape, self.ndim = weight.shape, 2
        self.dtype = np.dtype(np.float32)

    def __getitem__(self, rows: slice) -> np.ndarray:
        import numpy as np

        return np.asarray(self._weight[rows], np.float32) * self._factors

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype, copy=False)


@dataclass(frozen=True)
class Product:
    """x · W, W constant: stored as [N, K] where `transposed`, else as [K, N]; `scale` multiplies its K channels."""

    node: ir.Node
    weight: ir.Value
    transposed: bool
    bias: ir.Value | None = None
    scale: ir.Value | None = None

    @property
    def weight_name(self) -> str:
        return str(self.weight.name)

    @property
    def node_name(self) -> str:
        return str(self.node.name)

    @property
    def dtype(self) -> ir.DataType:
        """Data type of the activations."""
        import onnx_ir as ir

        found = self.node.inputs[0].dtype if self.node.inputs[0] is not None else None
        return found or self.node.outputs[0].dtype or ir.DataType.FLOAT

    @property
    def input(self) -> ir.Value:
        """x [..., K]."""
        assert self.node.inputs[0] is not None
        return self.node.inputs[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        assert self.weight.const_value is not None
        rows, columns = self.weight.const_value.shape.numpy()
        return (rows, columns) if self.transposed else (columns, rows)

    @property
    def identity(self) -> Hashable:
        """Equal for products by one W, stored one way: what is made of it serves all of them."""
        return bytes_of(self.weight), self.transposed, self.scale.name if self.scale is not None else None

    def matrix(self) -> np.ndarray:
        """W as [N, K], mapped from where it is stored, and scaled as it is read."""
        assert self.weight.const_value is not None
        stored = self.weight.const_value.numpy()
        mapped = stored if self.transposed else stored.T
        if self.scale is None:
            return mapped
        assert self.scale.const_value is not None
        return ScaledColumns(mapped, self.scale.const_value.numpy())  # type: ignore[return-value]


@dataclass(frozen=True)
class Lookup:
    """A Gather of rows of a constant table [V, D] by token ids."""

    node: ir.Node
    weight: ir.Value

    @property
    def shape(self) -> tuple[int, int]:
        """(V, D)."""
        assert self.weight.const_value is not None
        rows, columns = self.weight.const_value.shape.numpy()
        return rows, columns

    @property
    def weight_name(self) -> str:
        return str(self.weight.name)

    @property
    def node_name(self) -> str:
        return str(self.node.name)


def find_products(model: ir.Model) -> list[Product]:
    """Every plain product of float activations by a constant matrix, in the graph's order."""
    import onnx_ir as ir

    found = []
    for node in model.graph.all_nodes():
        product = _matmul(node) if node.op_type == "MatMul" else _gemm(node) if node.op_type == "Gemm" else None
        if product and not node.domain and product.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
            found.append(product)
    return found


def find_lookups(model: ir.Model, tokens: str) -> list[Lookup]:
    """The tables that the graph's input `tokens` is looked up in. Tables by position are none of them."""
    found = []
    for node in model.graph:
        if node.op_type != "Gather" or node.domain or node.attributes.get_int("axis", 0) != 0:
            continue
        table = constant_matrix(node.inputs[0])
        plain = table is not None and not table.transposed and table.scale is None
        if table is not None and plain and _comes_from(node.inputs[1], tokens):
            found.append(Lookup(node, table.weight))
    return found


def find_head(model: ir.Model, logits: str, products: Iterable[Product]) -> ir.Node | None:
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


def chosen_products(
    products: Sequence[Product], model: ir.Model, artifact: Artifact, *, exclude: Sequence[str], keep_head: bool
) -> list[Product]:
    """The products to quantize.

    Raises: PipelineError where there is no product, no head to keep, a pattern in `exclude` matches nothing, or nothing
    is left.
    """
    if not products:
        raise PipelineError("the graph multiplies by no constant float weight: there is nothing to quantize")
    skipped = excluded(exclude, products)
    if keep_head:
        skipped.add(head_of(model, artifact, products))
    chosen = [product for product in products if product.node not in skipped]
    if not chosen:
        raise PipelineError(f"all {len(products)} weights are excluded: there is nothing to quantize")
    return chosen


def head_of(model: ir.Model, artifact: Artifact, products: Sequence[Product]) -> ir.Node:
    """The language model's head.

    Raises: PipelineError where no product yields the logits.
    """
    head = find_head(model, artifact.interface.outputs.get("logits", "logits"), products)
    if head is None:
        raise PipelineError("the graph has no product that yields logits: leave `head` out")
    return head


def constant_matrix(value: ir.Value | None) -> ConstantMatrix | None:
    """The float matrix behind `value`, seen through casts, transpositions and scaled channels; None for another."""
    transposed = False
    scale: ir.Value | None = None
    while value is not None and (node := value.producer()) is not None:
        if node.domain or node.op_type not in ("Cast", "Identity", "Transpose", "Mul"):
            return None
        if node.op_type == "Mul":
            factors = node.inputs[1]
            if scale is not None or not _scales_channels(factors, transposed):
                return None
            scale = factors
        if node.op_type == "Transpose":
            permutation = node.attributes.get_ints("perm", (1, 0))
            if tuple(permutation) not in ((0, 1), (1, 0)):
                return None
            transposed ^= tuple(permutation) == (1, 0)
        value = node.inputs[0]
    tensor = value.const_value if value is not None else None
    if value is None or tensor is None or value.is_graph_input() or len(tensor.shape) != 2 or not tensor.size:
        return None
    if not tensor.dtype.is_floating_point() or tensor.dtype.bitwidth < 16:
        return None
    return ConstantMatrix(value, transposed, scale)


def _scales_channels(factors: ir.Value | None, transposed: bool) -> bool:
    """Whether these are factors of the rows that a product adds up: [K] before a transposition, [K, 1] without one."""
    tensor = factors.const_value if factors is not None else None
    if tensor is None or not tensor.dtype.is_floating_point():
        return False
    shape = list(tensor.shape.numpy())
    return len(shape) == 1 if transposed else len(shape) == 2 and shape[1] == 1


def bytes_of(weight: ir.Value) -> Hashable:
    """Equal for initializers that name the same bytes: a table that the head shares may have a name for each."""
    tensor = weight.const_value
    ref = getattr(tensor, "ref", None)
    return weight.name if ref is None else (getattr(tensor, "path", None), ref.offset, ref.length, ref.dtype, ref.shape)


def excluded(patterns: Sequence[str], items: Collection[Product | Lookup]) -> set[ir.Node]:
    """The nodes of those items whose weight or node some pattern names.

    Raises: PipelineError where a pattern names none.
    """
    found: set[ir.Node] = set()
    for pattern in patterns:
        matched = {
            item.node
            for item in items
            if fnmatchcase(item.weight_name, pattern) or fnmatchcase(item.node_name, pattern)
        }
        if not matched:
            weights = {item.weight_name for item in items}
            names = sorted(weights | {item.node_name for item in items if item.node_name})
            near = difflib.get_close_matches(pattern, names, n=SHOWN, cutoff=0)
            raise PipelineError(
                f"exclude: {pattern!r} matches none of the {len(weights)} weights, nor the name of a node",
                hint=f"the nearest are {', '.join(map(repr, near))}",
            )
        found |= matched
    return found


def add_initializer(model: ir.Model, name: str, array: np.ndarray, context: PassContext) -> ir.Value:
    """A new initializer of that name, or of the first like it that is free; large ones are streamed to disk."""
    while name in model.graph.initializers:  # one weight used both ways, [N, K] and [K, N]
        name += "_"
    return register(model, name, new_tensor(context.output, name, array))


def register(model: ir.Model, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    import onnx_ir as ir

    shape = ir.Shape(tensor.shape.numpy())
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
    model.graph.register_initializer(value)
    return value


def replace(old: ir.Node, nodes: list[ir.Node]) -> None:
    """Put `nodes` in the place of `old`; the last one's output takes the place of `old`'s."""
    import onnx_ir as ir

    assert old.graph is not None
    for node in nodes:
        node.metadata_props.update(old.metadata_props)
    ir.convenience.replace_nodes_and_values(old.graph, old, [old], nodes, old.outputs, nodes[-1].outputs)


def with_bias(old: ir.Node, product: ir.Node, bias: ir.Value | None) -> list[ir.Node]:
    """`product` in the place of `old` and, where there is one, an Add of the bias after it."""
    import onnx_ir as ir

    if bias is None:
        return [product]
    add = ir.node("Add", [product.outputs[0], bias], name=f"{old.name}.bias")
    product.outputs[0].name = f"{old.outputs[0].name}.product"
    product.outputs[0].type, product.outputs[0].shape = old.outputs[0].type, old.outputs[0].shape
    return [product, add]


def remove_unused(model: ir.Model) -> None:
    """Remove the transpositions, casts and weights that nothing reads any more."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    RemoveUnusedNodesPass()(model)


def report_counts(context: PassContext, kind: str, done: int, items: Collection[Product | Lookup]) -> None:
    """Log how many of the products were quantized, and which were left.

    `items` are those that were left.
    """
    context.logger.info("%d of %d products by a constant weight quantized: %s", done, done + len(items), kind)
    for item in items:
        context.logger.info("left as it is: %s (%s)", item.weight_name, item.node_name or item.node.op_type)


def _matmul(node: ir.Node) -> Product | None:
    found = constant_matrix(node.inputs[1])
    return Product(node, found.weight, found.transposed, scale=found.scale) if found is not None else None


def _gemm(node: ir.Node) -> Product | None:
    """alpha · A · B + beta · C, where alpha and beta are 1 and A is not transposed."""
    attributes = node.attributes
    plain = (
        attributes.get_float("alpha", 1.0) == 1.0
        and attributes.get_float("beta", 1.0) == 1.0
        and not attributes.get_int("transA", 0)
    )
    found = constant_matrix(node.inputs[1])
    turned = bool(attributes.get_int("transB", 0))
    if not plain or found is None or (turned and found.scale is not None):
        return None
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    return Product(node, found.weight, found.transposed != turned, bias, found.scale)


def _comes_from(value: ir.Value | None, name: str) -> bool:
    while value is not None and (node := value.producer()) is not None:
        if node.op_type not in ("Cast", "Identity", "Reshape", "Unsqueeze", "Squeeze"):
            return False
        value = node.inputs[0]
    return value is not None and value.name == name


def refuse_subgraphs(products: Sequence[Product], model: ir.Model) -> None:
    """Raises: PipelineError where one of the products lies in a subgraph, whose values cannot be observed."""
    if inner := [p.weight_name for p in products if p.node.graph is not model.graph]:
        raise PipelineError(f"the product by {inner[0]!r} lies in a subgraph, which cannot be calibrated: exclude it")
