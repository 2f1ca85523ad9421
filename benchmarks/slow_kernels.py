"""How slow the settings are that `pipeline/measure/slow_kernels.py` calls slow, on this machine.

    python benchmarks/slow_kernels.py            # seconds; --large: K 2048, N 5632 instead of 1024, 1024

Each row is one product of M rows by random weights in a session of its own, the median of what a quarter of a second
holds. The last column says what the table tells of the node: every row without a word there should be fast.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from onnxruntime.capi.onnxruntime_pybind11_state import Fail
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NotImplementedByProvider
from rich.console import Console
from rich.table import Table

from pipeline.measure.slow_kernels import slow_nodes

SECONDS = 0.25
MICROSOFT = "com.microsoft"
RANDOM = np.random.default_rng(0)


def initializer(name: str, array: Any) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    return ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=tensor.shape)


def product(operator: str, k: int, weights: list[ir.Value | None], dtype: Any, **attributes: Any) -> ir.Model:
    """x [m, k] times constant weights."""
    kind = ir.DataType.from_numpy(np.dtype(dtype))
    x = ir.Value(name="x", type=ir.TensorType(kind), shape=ir.Shape(["m", k]))
    domain = "" if operator in {"MatMul", "Gemm"} else MICROSOFT
    node = ir.node(operator, [x, *weights], attributes, domain=domain)
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(kind)
    graph = ir.Graph(
        [x], node.outputs, nodes=[node], initializers=[w for w in weights if w], opset_imports={"": 21, MICROSOFT: 1}
    )
    return ir.Model(graph, ir_version=10)


def dense(operator: str, k: int, n: int, dtype: Any) -> ir.Model:
    return product(operator, k, [initializer("w", RANDOM.standard_normal((k, n)).astype(dtype))], dtype)


def nbits(
    k: int, n: int, bits: int, block: int, level: int, *, zeros: str = "", order: bool = False, dtype: Any = np.float32
) -> ir.Model:
    blocks = k // block
    weights: list[ir.Value | None] = [
        initializer("w", RANDOM.integers(0, 255, (n, blocks, block * bits // 8), dtype=np.uint8)),
        initializer("s", RANDOM.random((n, blocks)).astype(dtype)),
    ]
    if zeros == "float":
        weights.append(initializer("z", RANDOM.random((n, blocks)).astype(dtype)))
    elif zeros == "packed":
        weights.append(initializer("z", RANDOM.integers(0, 255, (n, (blocks * bits + 7) // 8), dtype=np.uint8)))
    if order:
        weights += [None] * (3 - len(weights)) + [initializer("g", (np.arange(k) // block).astype(np.int32))]
    settings = {"K": k, "N": n, "bits": bits, "block_size": block, "accuracy_level": level}
    return product("MatMulNBits", k, weights, dtype, **settings)


def bnb4(k: int, n: int) -> ir.Model:
    weights = [
        initializer("w", RANDOM.integers(0, 255, (k * n // 2,), dtype=np.uint8)),
        initializer("s", RANDOM.random(k * n // 64).astype(np.float32)),
    ]
    return product("MatMulBnb4", k, weights, np.float32, K=k, N=n, block_size=64, quant_type=1)


def cases(k: int, n: int) -> Iterator[tuple[str, Any, Callable[[], ir.Model]]]:
    """(what, data type of x, the graph)."""
    yield "MatMul float32", np.float32, lambda: dense("MatMul", k, n, np.float32)
    yield "MatMul float16", np.float16, lambda: dense("MatMul", k, n, np.float16)
    yield "Gemm float16", np.float16, lambda: dense("Gemm", k, n, np.float16)
    yield "MatMulBnb4", np.float32, lambda: bnb4(k, n)
    for bits in (2, 4, 8):
        for level in (0, 1, 4):
            yield f"{bits} bits, level {level}", np.float32, lambda b=bits, a=level: nbits(k, n, b, 32, a)
        for block in (16, 64, 128, 256):
            yield f"{bits} bits, block {block}", np.float32, lambda b=bits, s=block: nbits(k, n, b, s, 4)
        for zeros in ("packed", "float"):
            yield f"{bits} bits, {zeros} zeros", np.float32, lambda b=bits, z=zeros: nbits(k, n, b, 32, 4, zeros=z)
        yield f"{bits} bits, g_idx", np.float32, lambda b=bits: nbits(k, n, b, 32, 4, order=True)
        yield f"{bits} bits, float16", np.float16, lambda b=bits: nbits(k, n, b, 32, 4, dtype=np.float16)


def microseconds(session: onnxruntime.InferenceSession, rows: int, k: int, dtype: Any) -> float:
    x = RANDOM.standard_normal((rows, k)).astype(dtype)
    session.run(None, {"x": x})
    times: list[float] = []
    began = time.perf_counter()
    while time.perf_counter() - began < SECONDS:
        start = time.perf_counter()
        session.run(None, {"x": x})
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--large", action="store_true", help="K 2048, N 5632")
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    k, n = (2048, 5632) if asked.large else (1024, 1024)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = asked.threads
    options.log_severity_level = 4
    table = Table(title=f"K {k}, N {n}, {asked.threads} threads, ONNX Runtime {onnxruntime.__version__}")
    setting = "setting (MatMulNBits: block 32, level 4 unless said)"
    for column in (setting, "1 row, us", "128 rows, us", "the table says"):
        table.add_column(column)
    for what, dtype, make in cases(k, n):
        model = make()
        said = "; ".join(found.reason.partition(":")[0] for found in slow_nodes([model]))
        try:
            session = onnxruntime.InferenceSession(
                ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
            row = [f"{microseconds(session, rows, k, dtype):,.0f}" for rows in (1, 128)]
        except (Fail, NotImplementedByProvider) as error:
            row = ["refused", type(error).__name__]
        table.add_row(what, *row, said)
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
