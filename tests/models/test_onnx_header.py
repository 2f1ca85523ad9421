"""An ONNX file's header is read without its weights, and a damaged file is told."""

from __future__ import annotations

import resource
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from pipeline.errors import PipelineError
from pipeline.models.onnx_header import read_onnx_header

Write = Callable[..., Path]


def test_the_header_is_what_onnx_itself_reads(tmp_path: Path, write_graph: Write) -> None:
    path = write_graph(tmp_path, external=True)
    header = read_onnx_header(path)
    model = onnx.load(path, load_external_data=False)

    def described(values: list[onnx.ValueInfoProto]) -> list[tuple[str, list[int | str]]]:
        return [(v.name, [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]) for v in values]

    assert [(v.name, list(v.shape or ())) for v in header.inputs] == described(list(model.graph.input))
    assert [(v.name, list(v.shape or ())) for v in header.outputs] == described(list(model.graph.output))
    assert {v.dtype for v in header.inputs} == {"int64", "float32"}
    assert header.initializers == 3
    assert header.operators == {node.op_type for node in model.graph.node}
    assert header.parameters == 2 * 32 * 8
    outside = {
        t.name: {e.key: e.value for e in t.external_data}
        for t in model.graph.initializer
        if t.data_location == TensorProto.EXTERNAL
    }
    assert {t.name: t.location for t in header.external} == {n: e["location"] for n, e in outside.items()}
    assert {t.name: (t.offset, t.length) for t in header.external} == {
        n: (int(e.get("offset", 0)), int(e["length"])) for n, e in outside.items()
    }
    assert {t.name: t.shape for t in header.external} == {"embed": (32, 8), "head": (8, 32)}


def test_initializers_among_the_inputs_are_no_inputs(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.ones((2, 2), np.float32), "w")
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, 2]) for n in ("x", "w", "y")]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", values[:2], values[2:], [weight])
    onnx.save(helper.make_model(graph), tmp_path / "m.onnx")
    assert [v.name for v in read_onnx_header(tmp_path / "m.onnx").inputs] == ["x"]


def test_a_dimension_without_a_name_and_a_type_without_a_shape_are_told_apart(tmp_path: Path) -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 3])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    onnx.save(helper.make_model(graph), tmp_path / "m.onnx")
    header = read_onnx_header(tmp_path / "m.onnx")
    assert header.inputs[0].shape == (None, 3)
    assert header.outputs[0].shape is None


def test_external_tensors_in_subgraphs_are_found(tmp_path: Path) -> None:
    inner = numpy_helper.from_array(np.ones(4, np.float32), "hidden")
    inner.ClearField("raw_data")
    inner.data_location = TensorProto.EXTERNAL
    inner.external_data.add(key="location", value="elsewhere")
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, [4])
    branch = helper.make_graph([helper.make_node("Identity", ["hidden"], ["out"])], "b", [], [out], [inner])
    node = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    c = helper.make_tensor_value_info("c", TensorProto.BOOL, [])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])
    onnx.save(helper.make_model(helper.make_graph([node], "g", [c], [y])), tmp_path / "m.onnx")
    assert read_onnx_header(tmp_path / "m.onnx").hidden == ("hidden", "hidden")


def test_weights_inside_the_file_are_not_read(tmp_path: Path) -> None:
    size = 200_000_000
    weight = helper.make_tensor("w", TensorProto.UINT8, [size], bytes(size), raw=True)
    y = helper.make_tensor_value_info("y", TensorProto.UINT8, [size])
    model = helper.make_model(helper.make_graph([helper.make_node("Identity", ["w"], ["y"])], "g", [], [y], [weight]))
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    before = resource.getrusage(resource.RUSAGE_SELF)
    assert read_onnx_header(path).initializers == 1
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert (after.ru_minflt + after.ru_majflt) - (before.ru_minflt + before.ru_majflt) < 2000  # of 48,828 pages


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "is empty"),
        (b"not a model at all", "is no ONNX file, or is cut off"),
        (b"\x08\x0a", "it holds 0 graphs"),
        (b"\x3a\x7fabc", "bytes are announced"),
        (b"\x3a", "ends within a number"),
        (b"\x3b", "does not begin a field"),
        (b"\x3a\x02\x58\x01", "a message is expected"),
    ],
)
def test_what_is_no_model_is_told(data: bytes, why: str, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(data)
    with pytest.raises(PipelineError, match=why):
        read_onnx_header(tmp_path / "m.onnx")


def test_a_cut_file_is_told(tmp_path: Path, write_graph: Write) -> None:
    path = write_graph(tmp_path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(PipelineError, match="is cut off"):
        read_onnx_header(path)


@given(st.binary(max_size=60))
def test_no_bytes_raise_anything_else(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "noise.onnx"
    path.write_bytes(data)
    with suppress(PipelineError):
        read_onnx_header(path)
