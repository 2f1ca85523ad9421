"""Graphs and checkpoints as users bring them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

VOCABULARY, WIDTH, HEADS, SIZE, POSITIONS = 32, 8, 2, 4, 64

Dims = list[int | str | None]


@pytest.fixture
def write_graph() -> Callable[..., Path]:
    return save_graph


def save_graph(
    folder: Path,
    *,
    name: str = "model.onnx",
    inputs: dict[str, Dims] | None = None,
    outputs: dict[str, Dims] | None = None,
    without: tuple[str, ...] = (),
    external: bool = False,
    present: str = "present",
    data: str = "model.onnx_data",
    dtype: int = TensorProto.FLOAT,
    config: dict[str, Any] | None = None,
) -> Path:
    """Save a one-layer language model with the names that optimum gives.

    `inputs` and `outputs` add values or change shapes, `without` takes some out. Its logits are those of the last
    token alone, and it attends to nothing: enough to be called and to be compared.
    """
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    weights = {
        "embed": random.normal(size=(VOCABULARY, WIDTH)).astype(np.float32),
        "head": random.normal(size=(WIDTH, VOCABULARY)).astype(np.float32),
        "split": np.array([0, 0, HEADS, SIZE], np.int64),
    }
    cache: Dims = ["batch", HEADS, "past", SIZE]
    given: dict[str, Dims] = {
        "input_ids": ["batch", "sequence"],
        "attention_mask": ["batch", "total"],
        "past_key_values.0.key": cache,
        "past_key_values.0.value": cache,
        **(inputs or {}),
    }
    made: dict[str, Dims] = {
        "logits": ["batch", "sequence", VOCABULARY],
        f"{present}.0.key": ["batch", HEADS, "total", SIZE],
        f"{present}.0.value": ["batch", HEADS, "total", SIZE],
        **(outputs or {}),
    }
    nodes = [
        helper.make_node("Gather", ["embed", "input_ids"], ["x"]),
        helper.make_node("MatMul", ["x", "head"], ["logits"]),
        helper.make_node("Reshape", ["x", "split"], ["parts"]),
        helper.make_node("Transpose", ["parts"], ["heads"], perm=[0, 2, 1, 3]),
        helper.make_node("Concat", ["past_key_values.0.key", "heads"], [f"{present}.0.key"], axis=2),
        helper.make_node("Concat", ["past_key_values.0.value", "heads"], [f"{present}.0.value"], axis=2),
    ]

    def value(name: str, shape: Dims) -> onnx.ValueInfoProto:
        kept = name.startswith(("past", "present"))
        element = dtype if kept else TensorProto.FLOAT if name == "logits" else TensorProto.INT64
        return helper.make_tensor_value_info(name, element, shape)

    graph = helper.make_graph(
        nodes,
        "tiny",
        [value(n, shape) for n, shape in given.items() if n not in without],
        [value(n, shape) for n, shape in made.items() if n not in without],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    path = folder / name
    if external:
        onnx.save_model(model, path, save_as_external_data=True, location=data, size_threshold=200)
    else:
        onnx.save_model(model, path)
    settings = {"max_position_embeddings": POSITIONS} if config is None else config
    if settings:
        (folder / "config.json").write_text(json.dumps(settings))
    return path
