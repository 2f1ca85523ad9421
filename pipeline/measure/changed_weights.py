"""Whether weights changed between two graphs that differ in other ways, too.

A new constant that stands for several nodes, as an optimizer folds them, is part of a change of the graph.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Hashable, Mapping
from typing import TYPE_CHECKING

from pipeline.measure.fingerprint import GraphHash, function_hash
from pipeline.measure.graph_match import Match, Nodes
from pipeline.measure.graph_weights import weights_of
from pipeline.measure.weight_contents import Contents

if TYPE_CHECKING:
    import onnx_ir as ir


def weights_changed(before: ir.Model, after: ir.Model, match: Match, contents: Contents) -> bool:
    """Whether a node that both have reads other values, or a weight is kept in another data type.

    Where a direct neighbour of such a node is gone that read numbers of its own (a scale, a bias, the statistics of a
    normalization), these were folded into the node's weights, and its other values do not count.
    """
    return (
        _other_data_types(before, after, contents)
        or _rewritten(before, after, match, contents)
        or _functions_rewritten(before, after)
    )


def _rewritten(before: ir.Model, after: ir.Model, match: Match, contents: Contents) -> bool:
    old, new = (GraphHash(contents=True, known=contents.of, opsets=m.opset_imports) for m in (before, after))
    return any(
        old.alone(match.before.nodes[was]) != new.alone(match.after.nodes[now]) and not _was_folded_into(match, was)
        for was, now in match.forward.items()
    )


def _functions_rewritten(before: ir.Model, after: ir.Model) -> bool:
    """Whether a function of both has the same nodes, and other values in their constants."""
    both = [(function, after.functions[key]) for key, function in before.functions.items() if key in after.functions]
    return any(
        function_hash(old, contents=False) == function_hash(new, contents=False)
        and function_hash(old, contents=True) != function_hash(new, contents=True)
        for old, new in both
    )


def _was_folded_into(match: Match, number: int) -> bool:
    around = [source[0] for source in match.before.sources[number] if source is not None and source[0] >= 0]
    around += [user for _, user, _ in match.before.users[number]]
    return any(other not in match.forward and _reads_numbers(match.before, other) for other in around)


def _reads_numbers(nodes: Nodes, number: int) -> bool:
    """Whether it takes a constant in floating point; those of shapes and axes are integers."""
    for value in nodes.nodes[number].inputs:
        if value is None:
            continue
        tensor = value.const_value
        maker = value.producer()
        if tensor is None and maker is not None and maker.op_type == "Constant" and "value" in maker.attributes:
            tensor = maker.attributes["value"].as_tensor()
        if tensor is not None and tensor.dtype.is_floating_point():
            return True
    return False


def _other_data_types(before: ir.Model, after: ir.Model, contents: Contents) -> bool:
    """Whether a weight that is gone and one that is new have the same sizes, in any order, and other data types."""
    old, new = ({contents.of.get(w, w): t for w, t in weights_of([m]).items()} for m in (before, after))  # type: ignore[call-overload]
    gone, came = _types_by_sizes(old, new.keys()), _types_by_sizes(new, old.keys())
    return any(gone[sizes] - came[sizes] and came[sizes] - gone[sizes] for sizes in gone.keys() & came.keys())


def _types_by_sizes(
    weights: Mapping[Hashable, ir.TensorProtocol], others: Collection[Hashable]
) -> Mapping[tuple[int, ...], Counter[str]]:
    """Data types, by sizes, of the weights whose bytes are not among the others'."""
    found: dict[tuple[int, ...], Counter[str]] = defaultdict(Counter)
    for content, tensor in weights.items():
        if content not in others:
            found[tuple(sorted(tensor.shape.numpy()))][tensor.dtype.name] += 1
    return found
