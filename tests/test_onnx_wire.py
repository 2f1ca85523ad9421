"""Tensors outside a graph are found wherever they stand, and a graph that names files on its own is run by nobody."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
from google.protobuf.descriptor import Descriptor  # type: ignore[import-untyped]
from onnx import TensorProto, helper, numpy_helper

from pipeline import check_external_tensors
from pipeline.artifact import (
    MAIN_COMPONENT,
    ONNX_FILE,
    Artifact,
    CacheLayout,
    Component,
    FileEntry,
    Interface,
    Manifest,
)
from pipeline.errors import PipelineError
from pipeline.onnx_model import load_onnx
from pipeline.onnx_wire import HOLDERS, Outside, external_tensors
from pipeline.runtime import ExecutionSpec, load_runner


def outside(location: str = "elsewhere", name: str = "secret") -> TensorProto:
    """A tensor [4] float32 whose bytes lie in `location`."""
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", "0"), ("length", "16")):
        tensor.external_data.add(key=key, value=value)
    return tensor


def sparse(location: str) -> onnx.SparseTensorProto:
    indices = numpy_helper.from_array(np.arange(4), "indices")
    return onnx.SparseTensorProto(values=outside(location), indices=indices, dims=[8])


def constant(**value: Any) -> onnx.NodeProto:
    return helper.make_node("Constant", [], ["c"], **value)


def in_function(model: onnx.ModelProto, location: str) -> None:
    opsets = [helper.make_opsetid("", 18)]
    model.functions.append(helper.make_function("own", "Hold", [], ["c"], [constant(value=outside(location))], opsets))
    model.graph.node.append(helper.make_node("Hold", [], ["held"], domain="own"))
    model.opset_import.append(helper.make_opsetid("own", 1))


def in_default_of_a_function(model: onnx.ModelProto, location: str) -> None:
    in_function(model, location)
    function = model.functions[0]
    function.attribute_proto.append(function.node[0].attribute[0])
    del function.node[:]


def in_constant(model: onnx.ModelProto, location: str) -> None:
    model.graph.node.append(constant(value=outside(location)))


def in_sparse_constant(model: onnx.ModelProto, location: str) -> None:
    model.graph.node.append(constant(sparse_value=sparse(location)))


def in_tensors(model: onnx.ModelProto, location: str) -> None:
    model.graph.node.append(helper.make_node("Own", [], ["o"], domain="own", many=[outside(location)]))


def in_sparse_tensors(model: onnx.ModelProto, location: str) -> None:
    model.graph.node.append(helper.make_node("Own", [], ["o"], domain="own", many=[sparse(location)]))


def in_sparse_initializer(model: onnx.ModelProto, location: str) -> None:
    model.graph.sparse_initializer.append(sparse(location))


def in_subgraph(model: onnx.ModelProto, location: str) -> None:
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, [4])
    nodes = [helper.make_node("Identity", ["secret"], ["out"])]
    branch = helper.make_graph(nodes, "b", [], [out], [outside(location)])
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "condition"))
    model.graph.node.append(helper.make_node("If", ["condition"], ["chosen"], then_branch=branch, else_branch=branch))


def in_training(model: onnx.ModelProto, location: str) -> None:
    model.training_info.add().algorithm.initializer.append(outside(location))


PLACES = [
    in_function,
    in_default_of_a_function,
    in_constant,
    in_sparse_constant,
    in_tensors,
    in_sparse_tensors,
    in_sparse_initializer,
    in_subgraph,
    in_training,
]


def language_model() -> onnx.ModelProto:
    """A graph with an interface: logits are rows of the embedding, and the cache is what it was."""
    cache = ["batch", 1, "past", 4]
    values = [("tokens", TensorProto.INT64, ["batch", "length"])]
    values += [(name, TensorProto.FLOAT, cache) for name in ("past_k", "past_v")]
    made = [("logits", ["batch", "length", 4]), ("present_k", cache), ("present_v", cache)]
    nodes = [helper.make_node("Gather", ["embed", "tokens"], ["logits"])]
    nodes += [helper.make_node("Identity", [f"past_{part}"], [f"present_{part}"]) for part in "kv"]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(*value) for value in values],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in made],
        [numpy_helper.from_array(np.eye(4, dtype=np.float32), "embed")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def artifact_of(model: onnx.ModelProto, folder: Path) -> Artifact:
    path = folder / ONNX_FILE
    path.write_bytes(model.SerializeToString())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    roles = {f"{when}.{part}[0]": f"{when}_{part}" for when in ("past", "present") for part in "kv"}
    interface = Interface(
        task="causal-lm",
        inputs={"tokens": "tokens"} | {k: v for k, v in roles.items() if k.startswith("past")},
        outputs={"logits": "logits"} | {k: v for k, v in roles.items() if k.startswith("present")},
        cache=CacheLayout(layers=1, kv_heads=1, head_dim=4, dtype="float32"),
        vocab_size=4,
        max_length=8,
    )
    entry = FileEntry(digest=digest, size_bytes=path.stat().st_size, path=str(path))
    component = Component(format="onnx", files={ONNX_FILE: entry})
    return Artifact(Manifest(format="onnx", components={MAIN_COMPONENT: component}, interface=interface), folder)


def reaches_tensors(message: Descriptor, seen: frozenset[str] = frozenset()) -> bool:
    if message.name == "TensorProto":
        return True
    inner = [f.message_type for f in message.fields if f.message_type and f.message_type.name not in seen]
    return any(reaches_tensors(m, seen | {message.name}) for m in inner)


def test_all_fields_of_the_format_that_may_hold_a_tensor_are_searched() -> None:
    found: dict[str, dict[int, str]] = {}
    waiting = [onnx.ModelProto.DESCRIPTOR]
    while waiting:
        message = waiting.pop()
        if message.name in found or message.name == "TensorProto":
            continue
        inner = {f.number: f.message_type for f in message.fields if f.message_type and reaches_tensors(f.message_type)}
        found[message.name] = {number: kind.name for number, kind in inner.items()}
        waiting += inner.values()
    assert found == HOLDERS


@pytest.mark.parametrize("put", PLACES)
def test_a_tensor_outside_is_found_wherever_it_stands(put: Callable[[onnx.ModelProto, str], None]) -> None:
    model = language_model()
    assert list(external_tensors(model.SerializeToString())) == []
    put(model, "elsewhere")
    assert set(external_tensors(model.SerializeToString())) == {Outside("secret", main=False)}


@pytest.mark.parametrize("put", PLACES)
def test_no_runner_and_no_pass_opens_a_graph_that_names_files_itself(
    put: Callable[[onnx.ModelProto, str], None], tmp_path: Path
) -> None:
    (tmp_path / "key").write_bytes(np.arange(4, dtype=np.float32).tobytes())
    model = language_model()
    load_runner(artifact_of(model, tmp_path), ExecutionSpec()).prefill([[1, 2]])
    put(model, str(tmp_path / "key").lstrip("/"))
    artifact = artifact_of(model, tmp_path)
    with pytest.raises(PipelineError, match=r"keeps the tensor 'secret' .* outside, and the manifest does not say"):
        load_runner(artifact, ExecutionSpec())
    with pytest.raises(PipelineError, match=r"keeps the tensor 'secret' .* outside, and the manifest does not say"):
        load_onnx(artifact)


def test_an_initializer_that_the_manifest_does_not_name_is_refused() -> None:
    model = language_model()
    model.graph.initializer.append(outside())
    data = model.SerializeToString()
    check_external_tensors(data, {"secret"})
    with pytest.raises(PipelineError, match="keeps initializer 'secret' outside"):
        check_external_tensors(data, {"embed"})


@pytest.mark.parametrize(
    "said",
    [
        pytest.param(b"\x70\x01\x70\x00", id="twice, the last says inside"),
        pytest.param(b"\x70\x81\x80\x80\x80\x10", id="in more bits than an enumeration has"),
    ],
)
def test_a_location_that_readers_may_take_otherwise_counts_as_outside(said: bytes) -> None:
    tensor = b"\x42\x01t" + said
    attribute = b"\x2a" + bytes([len(tensor)]) + tensor
    node = b"\x2a" + bytes([len(attribute)]) + attribute
    graph = b"\x0a" + bytes([len(node)]) + node
    assert list(external_tensors(b"\x3a" + bytes([len(graph)]) + graph)) == [Outside("t", main=False)]


def test_what_is_no_graph_is_told() -> None:
    with pytest.raises(PipelineError, match=r"the graph is damaged: .* bytes are announced"):
        check_external_tensors(b"\x3a\x7fabc", ())


@pytest.mark.parametrize("put", [in_constant, in_subgraph])
def test_a_pass_gives_onnx_runtime_no_graph_that_names_files_itself(
    put: Callable[[onnx.ModelProto, str], None], tmp_path: Path
) -> None:
    from passes.export.verify import _session
    from passes.graph.offline import open_session, session_options

    (tmp_path / "key").write_bytes(np.arange(4, dtype=np.float32).tobytes())
    model = language_model()
    open_session(onnx_ir.from_proto(model), session_options(1))
    put(model, str(tmp_path / "key").lstrip("/"))
    with pytest.raises(PipelineError, match="the manifest does not say where"):
        open_session(onnx_ir.from_proto(model), session_options(1))
    with pytest.raises(PipelineError, match="the manifest does not say where"):
        _session(onnx_ir.from_proto(model), 1)
