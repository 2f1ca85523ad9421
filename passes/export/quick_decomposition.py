"""torch's program for ONNX, made of operators that ONNX has by looking at each, without tracing it a second time.

The exporter traces the whole program anew to take apart the operators that it cannot write, and to rid it of writes in
place. Programs of language models have a handful of such operators, which stand for one other or for nothing; of 22
layers, tracing them anew was half of the export's time. A program that has any other operator that torch would take
apart is traced anew.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram

logger = logging.getLogger("pipeline.pass.export_onnx")

NOTHING = object()
"""What stands for an operator whose output is its input."""


class Looking:
    """What became of the program."""

    taken_apart = False
    """It was, or was begun to be."""


@contextmanager
def by_looking() -> Iterator[Looking]:
    """Within, torch.onnx.export takes programs apart as above where it can.

    What is replaced is not torch's public interface: in a torch that has it otherwise, all is as torch does it.
    """
    looking = Looking()
    try:
        from torch._export.utils import _collect_all_valid_cia_ops, _is_cia_op
        from torch.onnx._internal.exporter import _fx_passes
        from torch.onnx._internal.exporter._decomp import get_onnx_implemented_overloads
        from torch.onnx._internal.fx.passes import type_promotion

        original = _fx_passes.decompose_with_registry
        rule_for, promoter = type_promotion.get_type_promotion_rule, type_promotion._TypePromotionInterpreter
        promote, _, _ = promoter.run_node, promoter._set_current_node, promoter._maybe_promote_node
    except (ImportError, AttributeError) as error:
        logger.info("exporting takes longer with this torch: %s", error)
        yield looking
        return

    def decompose(program: ExportedProgram, registry: Any) -> ExportedProgram:
        used = {node.target for node in program.graph.nodes if node.op == "call_function"}
        known = used & set(get_onnx_implemented_overloads(registry))
        # what is composite and never left whole by torch has a form in ONNX that nobody has tried
        composite = {target for target in known if _is_operator(target) and _is_cia_op(target)}
        looking.taken_apart = True  # and stays so where that raises midway
        looking.taken_apart = take_apart(program, known - (composite - _collect_all_valid_cia_ops()))
        return program if looking.taken_apart else original(program, registry)

    def promoted(self: Any, node: torch.fx.Node) -> Any:
        if node.op != "call_function" or node.meta.get("val") is None:
            return promote(self, node)
        with self._set_current_node(node):
            if rule := rule_for(node, self.type_promotion_table):
                self._maybe_promote_node(node, rule)
        return node.meta["val"]

    _fx_passes.decompose_with_registry = decompose
    promoter.run_node = promoted
    try:
        yield looking
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
            elif change is aten.split.Tensor:
                node.args, node.kwargs = (node.args[0], *_chunk_size(node)), {}
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
    rule = _rules().get(node.target)
    return None if rule is None else rule(node)


@cache
def _rules() -> dict[Any, Callable[[torch.fx.Node], Any]]:
    import torch

    aten = torch.ops.aten
    to_itself = (aten.detach.default, aten.detach_.default, aten.alias.default, aten.contiguous.default)
    casts = (aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.to.other)
    return {
        **dict.fromkeys(to_itself, lambda node: NOTHING),
        **dict.fromkeys(casts, _cast),
        aten.reshape.default: _reshape,
        aten.chunk.default: _chunk,
        aten.dropout.default: lambda node: NOTHING if node.args[2:] == (False,) else None,
        aten.__and__.Tensor: lambda node: aten.bitwise_and.Tensor,
        aten.__or__.Tensor: lambda node: aten.bitwise_or.Tensor,
    }


def _cast(node: torch.fx.Node) -> Any:
    import torch

    given, made = _given_and_made(node)
    if given.device != made.device or given.layout != made.layout:
        return None
    return NOTHING if given.dtype == made.dtype else torch.ops.aten._to_copy.default


def _reshape(node: torch.fx.Node) -> Any:
    """torch's takes a size of 0 for 0, as its view does in ONNX, and not for the input's size."""
    import torch

    given, made = _given_and_made(node)
    return NOTHING if str(given.shape) == str(made.shape) else torch.ops.aten.view.default


def _chunk(node: torch.fx.Node) -> Any:
    import torch

    return torch.ops.aten.split.Tensor if isinstance(_chunk_size(node)[0], int) else None


def _chunk_size(node: torch.fx.Node) -> tuple[Any, int]:
    """(size of all chunks but the last, dimension)."""
    dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    assert isinstance(dim, int)
    return node.meta["val"][0].shape[dim], dim


def _given_and_made(node: torch.fx.Node) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(value.meta["val"] for value in (node.args[0], node))  # type: ignore[union-attr, return-value]


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


def _is_operator(target: Any) -> bool:
    import torch

    return isinstance(target, torch._ops.OpOverload)


def _writes(target: Any) -> bool:
    schema = getattr(target, "_schema", None)
    return schema is not None and schema.is_mutable
