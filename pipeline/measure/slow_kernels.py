"""Nodes for which ONNX Runtime has no fast kernel at their settings: they run, and they are slow.

The table for processors was measured with ONNX Runtime 1.31.1 on two threads of an x86 processor with AVX-512, a
product of one row by K x N weights, each setting against the fastest of the same width; `benchmarks/slow_kernels.py`
measures it again. The one for GPUs is what its CUDA provider has no kernel for, by the list of kernels that ONNX
Runtime publishes (docs/OperatorKernels.md): such nodes run on the processor, between copies of what they take and give.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.report.schema import SlowNodes

if TYPE_CHECKING:
    import onnx_ir as ir

FAST_LEVEL = 4
"""accuracy_level at which MatMulNBits computes in int8."""


@dataclass(frozen=True)
class SlowKernel:
    """One row of the table: nodes of an operator that are slow, and why."""

    domain: str
    operator: str
    applies: Callable[[ir.Node], bool]
    reason: str


def _level(node: ir.Node) -> int:
    return node.attributes.get_int("accuracy_level", 0)


def _bits(node: ir.Node) -> int:
    return node.attributes.get_int("bits", 4)


def _block(node: ir.Node) -> int:
    return node.attributes.get_int("block_size", 0)


def _given(node: ir.Node, place: int) -> ir.Value | None:
    return node.inputs[place] if len(node.inputs) > place else None


def _has_float_zero_points(node: ir.Node) -> bool:
    """Input 3; packed ones are uint8."""
    value = _given(node, 3)
    dtype = value.dtype if value is not None else None
    if value is not None and dtype is None and value.const_value is not None:
        dtype = value.const_value.dtype
    return dtype is not None and dtype.is_floating_point()


def _has_order(node: ir.Node) -> bool:
    """Input 4, g_idx: the block that each row of the weights belongs to."""
    return _given(node, 4) is not None


def _takes(dtype: str) -> Callable[[ir.Node], bool]:
    def applies(node: ir.Node) -> bool:
        for value in node.inputs[:2]:
            if value is None:
                continue
            known = value.dtype or (value.const_value.dtype if value.const_value is not None else None)
            if known is not None and known.name == dtype:
                return True
        return False

    return applies


def _attends_in_single(node: ir.Node) -> bool:
    """A query, a past key or a table of cosines in float32: they have one data type, if not all say it."""
    known = [value.dtype for value in (_given(node, place) for place in (0, 3, 7)) if value is not None]
    return any(dtype is not None and dtype.name == "FLOAT" for dtype in known)


MICROSOFT = "com.microsoft"
HALF = (
    "float16 on a CPU: no fast kernel, or Casts at load (measured: for 128 rows 1.1 to 1.5 times slower than float32; "
    "one row, which is bound by memory, gains from half the bytes)"
)

TABLE = (
    # the first row that applies to a node is the one that is told
    SlowKernel(
        MICROSOFT,
        "MatMulNBits",
        _has_order,
        "g_idx: the weights are unpacked to float32 at every call (measured: 30 times slower; 8 bits: refused)",
    ),
    SlowKernel(
        MICROSOFT,
        "MatMulNBits",
        _has_float_zero_points,
        "zero points in floating point: the weights are unpacked to float32 at every call (measured: 5 times slower at "
        "2 bits, 38 times at 4; 8 bits: refused)",
    ),
    SlowKernel(
        MICROSOFT,
        "MatMulNBits",
        lambda node: _bits(node) in {2, 8} and _level(node) != FAST_LEVEL,
        "accuracy_level is not 4: at 2 and 8 bits only int8 arithmetic has a kernel, the weights are unpacked to "
        "float32 at every call (measured: 40 to 200 times slower)",
    ),
    SlowKernel(
        MICROSOFT,
        "MatMulNBits",
        lambda node: _bits(node) == 2 and _block(node) not in {32, 64, 128},
        "2 bits in blocks other than 32, 64 or 128: no kernel, the weights are unpacked to float32 at every call "
        "(measured: 50 times slower)",
    ),
    SlowKernel(
        MICROSOFT,
        "MatMulNBits",
        lambda node: _bits(node) == 4 and _level(node) != FAST_LEVEL,
        "accuracy_level is not 4: float32 arithmetic (measured: 1.5 to 6 times slower for one token)",
    ),
    SlowKernel(
        MICROSOFT,
        "MatMulBnb4",
        lambda node: True,
        "no packed kernel: the weights are unpacked to float32 at every call (measured: 16 times slower than "
        "MatMulNBits)",
    ),
    SlowKernel(
        "",
        "Gemm",
        _takes("FLOAT16"),
        HALF,
    ),
    SlowKernel(
        "",
        "MatMul",
        _takes("FLOAT16"),
        HALF,
    ),
    SlowKernel("", "MatMul", _takes("BFLOAT16"), "bfloat16: the CPU provider has no kernel, and refuses the graph"),
    SlowKernel("", "Gemm", _takes("BFLOAT16"), "bfloat16: the CPU provider has no kernel, and refuses the graph"),
)
"""Settings without a fast kernel. Block sizes other than 16, 32, 64, 128 and 256 are refused, so they need no row."""


ON_THE_PROCESSOR = "the CUDA provider has no kernel for it, so it runs on the processor, between copies"

CUDA_TABLE = (
    SlowKernel(
        MICROSOFT,
        "GroupQueryAttention",
        _attends_in_single,
        f"float32: {ON_THE_PROCESSOR}; it has them for float16 and bfloat16",
    ),
    SlowKernel(MICROSOFT, "DynamicQuantizeMatMul", lambda node: True, ON_THE_PROCESSOR),
    SlowKernel(MICROSOFT, "MatMulIntegerToFloat", lambda node: True, ON_THE_PROCESSOR),
)


def slow_nodes(models: Iterable[ir.Model], device: str = "cpu") -> tuple[SlowNodes, ...]:
    """The nodes of some graphs that are slow on that device, counted by operator and reason, most first."""
    rows: dict[tuple[str, str], list[SlowKernel]] = {}
    for row in CUDA_TABLE if device == "cuda" else TABLE:
        rows.setdefault((row.domain, row.operator), []).append(row)
    found: Counter[tuple[str, str]] = Counter()
    for model in models:
        for graph in model.graphs():
            for node in graph:
                row_of_node = next((r for r in rows.get((node.domain, node.op_type), ()) if r.applies(node)), None)
                if row_of_node is not None:
                    operator = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
                    found[operator, row_of_node.reason] += 1
    return tuple(SlowNodes(operator=o, count=count, reason=reason) for (o, reason), count in found.most_common())
