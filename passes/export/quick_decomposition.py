"""torch's program for ONNX, made of operators that ONNX has by looking at each, without tracing it a second time.

The exporter traces the whole program anew to take apart the operators that it cannot write, and to rid it of writes in
place. Programs of language models have a handful of such operators, which stand for one other or for nothing; of 22
layers, tracing them anew was half of the export's time. A program that has any other operator is traced anew.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram

logger = logging.getLogger("pipeline.pass.export_onnx")

NOTHING = object()
"""What stands for an operator whose output is its input."""


@contextmanager
def by_looking() -> Iterator[None]:
    """Within, torch.onnx.export takes programs apart as above where it can.

    What is replaced is not torch's public interface: in a torch that has it otherwise, all is as torch does it.
    """
    try:
        from torch.onnx._internal.exporter import _decomp, _fx_passes
        from torch.onnx._internal.fx.passes import type_promotion

        original = _fx_passes.decompose_with_registry
        promoter = type_promotion._TypePromotionInterpreter
        promote = promoter.run_node
    except (ImportError, AttributeError) as error:
        logger.info("exporting takes longer with this torch: %s", error)
        yield
        return

    def decompose(program: ExportedProgram, registry: Any) -> ExportedProgram:
        if take_apart(program, set(_decomp.get_onnx_implemented_overloads(registry))):
            return program
        return original(program, registry)

    def promoted(self: Any, node: torch.fx.Node) -> Any:
        if node.op != "call_function" or node.meta.get("val") is None:
            return promote(self, node)
        with self._set_current_node(node):
            if rule := type_promotion.get_type_promotion_rule(node, self.type_promotion_table):
                self._maybe_promote_node(node, rule)
        return node.meta["val"]

    _fx_passes.decompose_with_registry = decompose
    promoter.run_node = promoted
    try:
        yield
    finally:
        _fx_passes.decompose_with_registry = original
        promoter.run_node = promote


def take_apart(program: ExportedProgram, known: set[Any]) -> bool:
    """Whether the program could be, and now is, put into operators of `known`. Where not, it is as it was."""
    import torch
    from torch.export.graph_signature import OutputKind

    if any(spec.kind != OutputKind.USER_OUTPUT for spec in program.graph_signature.output_specs):
        return False
    if len(list(program.graph_module.modules())) > 1:
        return False  # a branch or a loop
    aten, known = torch.ops.aten, known | _checks()
    changes: list[tuple[torch.fx.Node, Any]] = []
    for node in program.graph.nodes:
        if node.op == "call_function":
            if (change := _change(node)) is not None:
                changes.append((node, change))
            elif node.target not in known or _writes(node.target):
                return False

    for node, change in changes:
        if change is not NOTHING:
            node.target = change
            if change is aten._to_copy.default:
                node.args, node.kwargs = node.args[:1], {"dtype": node.meta["val"].dtype}
        elif any(user.op == "output" for user in node.users):  # the program's signature knows it by its name
            node.target, node.args, node.kwargs = aten.clone.default, node.args[:1], {}
        else:
            node.replace_all_uses_with(node.args[0])
            program.graph.erase_node(node)
    program.graph.lint()
    program.graph_module.recompile()
    return True


def _change(node: torch.fx.Node) -> Any:
    """The operator that stands for the node's, NOTHING if none needs to, None if the node is to stay."""
    import torch

    aten = torch.ops.aten
    if node.target in (aten.detach.default, aten.detach_.default, aten.alias.default, aten.contiguous.default):
        return NOTHING
    if node.target in (aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.to.other):
        given, made = (value.meta.get("val") for value in (node.args[0], node))
        if given.device != made.device or given.layout != made.layout:
            return None
        return NOTHING if given.dtype == made.dtype else aten._to_copy.default
    if node.target is aten.reshape.default:  # which ONNX has, too, but takes a size of 0 for that of the input
        given, made = (value.meta.get("val") for value in (node.args[0], node))
        return NOTHING if str(given.shape) == str(made.shape) else aten.view.default
    return {aten.__and__.Tensor: aten.bitwise_and.Tensor, aten.__or__.Tensor: aten.bitwise_or.Tensor}.get(node.target)


def _checks() -> set[Any]:
    """What only asserts, and is taken out afterwards, and what picks one of several outputs."""
    import torch

    aten = torch.ops.aten
    return {
        operator.getitem,
        aten._assert_scalar.default,
        aten._assert_tensor_metadata.default,
        aten._assert_async.msg,
        aten.sym_constrain_range_for_size.default,
    }


def _writes(target: Any) -> bool:
    schema = getattr(target, "_schema", None)
    return schema is not None and schema.is_mutable
