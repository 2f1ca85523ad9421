"""Nodes that the CPU provider has no fast kernel for are told with the reason."""

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from pipeline.measure.slow_kernels import TABLE, slow_nodes


def product(zero_points: Any = None, order: bool = False, **attributes: int) -> ir.Model:
    """A MatMulNBits; only what the table looks at is as the operator's definition asks."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["n", 64]))
    weights = [initializer("w", np.zeros((8, 2, 16), np.uint8)), initializer("s", np.ones((8, 2), np.float32))]
    further = [initializer("z", zero_points) if zero_points is not None else None]
    further += [initializer("g", np.zeros(64, np.int32))] if order else []
    node = ir.node("MatMulNBits", [x, *weights, *further], attributes, domain="com.microsoft")
    return model([x], node, weights + [v for v in further if v is not None])


def initializer(name: str, array: Any) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    return ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=tensor.shape)


def model(inputs: list[ir.Value], node: ir.Node, initializers: list[ir.Value]) -> ir.Model:
    graph = ir.Graph(inputs, node.outputs, nodes=[node], initializers=initializers, opset_imports={"": 21})
    return ir.Model(graph, ir_version=10)


def reasons(made: ir.Model) -> list[str]:
    return [found.reason for found in slow_nodes([made])]


@pytest.mark.parametrize(
    ("attributes", "word"),
    [
        ({"bits": 8, "accuracy_level": 0}, "accuracy_level is not 4"),
        ({"bits": 8}, "accuracy_level is not 4"),
        ({"bits": 2, "accuracy_level": 1}, "accuracy_level is not 4"),
        ({"bits": 4}, "accuracy_level is not 4: float32 arithmetic"),
        ({"bits": 2, "accuracy_level": 4, "block_size": 16}, "2 bits in blocks"),
        ({"bits": 2, "accuracy_level": 4, "block_size": 256}, "2 bits in blocks"),
        ({"bits": 4, "accuracy_level": 4, "zero_points": np.zeros((8, 2), np.float32)}, "zero points in floating"),
        ({"bits": 4, "accuracy_level": 4, "order": True}, "g_idx"),
    ],
)
def test_settings_without_a_fast_kernel_are_told(attributes: dict[str, Any], word: str) -> None:
    (reason,) = reasons(product(**{"block_size": 32, **attributes}))
    assert reason.startswith(word)


@pytest.mark.parametrize(
    "attributes",
    [
        *({"bits": bits, "block_size": block} for bits in (4, 8) for block in (16, 32, 64, 128, 256)),
        *({"bits": 2, "block_size": block} for block in (32, 64, 128)),
        {"bits": 4, "block_size": 32, "zero_points": np.zeros((8, 1), np.uint8)},
    ],
)
def test_settings_with_a_fast_kernel_are_not(attributes: dict[str, Any]) -> None:
    assert reasons(product(accuracy_level=4, **attributes)) == []


@pytest.mark.parametrize(("dtype", "slow"), [("FLOAT", False), ("FLOAT16", True), ("BFLOAT16", True)])
@pytest.mark.parametrize("operator", ["MatMul", "Gemm"])
def test_products_in_half_precision_are_slow_on_a_cpu(dtype: str, slow: bool, operator: str) -> None:
    values = [ir.Value(name=n, type=ir.TensorType(ir.DataType[dtype]), shape=ir.Shape([4, 4])) for n in "ab"]
    found = slow_nodes([model(values, ir.node(operator, values), [])])
    assert bool(found) is slow
    assert all(dtype.lower() in node.reason for node in found)


def test_nodes_of_one_reason_are_counted_together() -> None:
    (found,) = slow_nodes([product(bits=8, block_size=32), product(bits=8, block_size=32)])
    assert (found.operator, found.count) == ("com.microsoft.MatMulNBits", 2)


def test_every_reason_says_what_was_measured_or_that_it_is_refused() -> None:
    assert all("measured" in row.reason or "refuses" in row.reason for row in TABLE)


def attention(dtype: ir.DataType | None, past: ir.DataType | None = None) -> ir.Model:
    names = ("query", "key", "value", "past_key", "past_value", "lengths", "total")
    types = (dtype, dtype, dtype, past, past, ir.DataType.INT32, ir.DataType.INT32)
    values = [ir.Value(name=n, type=ir.TensorType(t) if t else None) for n, t in zip(names, types, strict=True)]
    return model(values, ir.node("GroupQueryAttention", values, {"num_heads": 4}, domain="com.microsoft"), [])


def test_attention_in_float32_runs_on_the_processor_of_a_gpu_host() -> None:
    (found,) = slow_nodes([attention(ir.DataType.FLOAT)], "cuda")
    assert (found.operator, found.count) == ("com.microsoft.GroupQueryAttention", 1)
    assert "no kernel for it, so it runs on the processor" in found.reason
    (by_its_cache,) = slow_nodes([attention(None, past=ir.DataType.FLOAT)], "cuda")
    assert by_its_cache == found
    assert slow_nodes([attention(ir.DataType.FLOAT16, past=ir.DataType.FLOAT16)], "cuda") == ()
    assert slow_nodes([attention(ir.DataType.FLOAT)], "cpu") == ()


def test_what_is_slow_on_a_processor_is_not_told_of_a_gpu() -> None:
    assert slow_nodes([product(bits=8, accuracy_level=0)], "cuda") == ()
