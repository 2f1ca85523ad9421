"""onnxscript's rules with several outputs, tried in time that grows with the graph and not with its square.

To match such a rule at a node, onnxscript lists the whole graph first, and looks last whether the node is of the
operator that the rule begins with. To ask that first has the same outcome, and of 22 layers it saves most of the time
that simplifying takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx_ir as ir


@contextmanager
def first_node_first() -> Iterator[None]:
    """Within, a rule with several outputs is tried only at nodes that its first output's node pattern can match."""
    from onnxscript.rewriter.pattern import MatchResult, SimplePatternMatcher

    original = SimplePatternMatcher.match

    def match(
        self: Any, model: ir.Model, graph_or_function: ir.Graph | ir.Function, node: ir.Node, **options: Any
    ) -> Any:
        if not self.pattern.has_single_output_node:
            first = self.pattern.output_nodes[0]
            if not (first.op.matches(node.op_type) and first.domain.matches(node.domain)):
                return MatchResult().fail(f"{node.op_type} is not what the pattern begins with.")
        return original(self, model, graph_or_function, node, **options)

    SimplePatternMatcher.match = match
    try:
        yield
    finally:
        SimplePatternMatcher.match = original
