"""onnx_model: graphs that passes edit, whose weights stay where they lie."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from pipeline import Artifact, Interface, Manifest, PipelineError, load_onnx, new_tensor, referenced_tensor, save_onnx
from pipeline.artifact import ONNX_FILE, Component, TensorRef
from pipeline.onnx_model import INLINE_BYTES
from pipeline.store.store import Store
from pipeline.store.writer import OutputWriter
from pipeline.stored_tensor import StoredTensor

BIG = np.arange(600, dtype=np.float32).reshape(20, 30)
SMALL = np.arange(30, dtype=np.float32)


class Workshop:
    """A store, a place to write to, and an artifact with nothing but an interface."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = Store(folder / "store")
        self.empty = Artifact(
            Manifest(format="onnx", components={}, interface=Interface(max_length=8)), self.store.blobs
        )
        self._count = 0

    def writer(self) -> OutputWriter:
        self._count += 1
        return OutputWriter(self.folder / str(self._count))

    def staged(self) -> list[Path]:
        """Files that the last writer wrote."""
        return sorted((self.folder / str(self._count) / "blobs").iterdir())

    def save(self, model: ir.Model, output: OutputWriter | None = None, like: Artifact | None = None) -> Artifact:
        made = save_onnx(model, output or self.writer(), like=like or self.empty)
        return self.store.publish(self.folder / str(self._count), made.manifest)

    def keep(self, model: ir.Model, output: OutputWriter | None = None) -> Component:
        """Save without publishing, so that the staged files can be looked at."""
        return save_onnx(model, output or self.writer(), like=self.empty).component


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path)


def model_with(**tensors: np.ndarray | ir.TensorProtocol) -> ir.Model:
    """y = x + the initializers, each of which the others broadcast with."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([20, 30]))
    values, nodes, last = [], [], x
    for name, given in tensors.items():
        tensor = ir.Tensor(given, name=name) if isinstance(given, np.ndarray) else given
        values.append(ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor))
        nodes.append(ir.node("Add", [last, values[-1]], name=f"add_{name}"))
        last = nodes[-1].outputs[0]
    last.name = "y"
    graph = ir.Graph([x], [last], nodes=nodes, initializers=values, opset_imports={"": 23}, name="g")
    return ir.Model(graph, ir_version=10)


def values_of(model: ir.Model) -> dict[str, np.ndarray]:
    return {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}


def test_values_survive_saving_and_loading(workshop):
    made = workshop.save(model_with(big=BIG, small=SMALL))
    loaded = values_of(load_onnx(made))
    assert np.array_equal(loaded["big"], BIG) and np.array_equal(loaded["small"], SMALL)


def test_large_initializers_are_mapped_and_small_ones_are_in_the_graph(workshop):
    made = workshop.save(model_with(big=BIG, small=SMALL))
    assert BIG.nbytes > INLINE_BYTES >= SMALL.nbytes
    assert list(made.component.tensors) == ["big"]
    tensors = {name: value.const_value for name, value in load_onnx(made).graph.initializers.items()}
    assert isinstance(tensors["big"], StoredTensor) and not isinstance(tensors["small"], StoredTensor)


def test_mapped_values_cannot_be_written_to(workshop):
    with pytest.raises(ValueError, match="read-only"):
        values_of(load_onnx(workshop.save(model_with(big=BIG))))["big"][0] = 1


def test_an_unchanged_graph_is_the_same_artifact(workshop):
    first = workshop.save(model_with(big=BIG, small=SMALL))
    assert workshop.save(load_onnx(first)).digest == first.digest


def test_initializers_that_were_not_touched_are_not_written_again(workshop):
    first = workshop.save(model_with(big=BIG, other=BIG + 1))
    model = load_onnx(first)
    model.graph.initializers["other"].const_value = ir.Tensor(BIG + 2, name="other")
    component = workshop.keep(model)
    assert component.tensors["big"] == first.component.tensors["big"]
    assert sum(path.stat().st_size for path in workshop.staged()) < 2 * BIG.nbytes


def test_a_renamed_initializer_keeps_its_bytes(workshop):
    model = load_onnx(workshop.save(model_with(big=BIG)))
    model.graph.initializers["big"].name = "renamed"
    made = workshop.save(model)
    assert np.array_equal(values_of(load_onnx(made))["renamed"], BIG)
    assert list(made.component.tensors) == ["renamed"]


def test_initializers_that_share_bytes_are_counted_once(workshop):
    model = load_onnx(workshop.save(model_with(big=BIG, twin=BIG + 1)))
    model.graph.initializers["twin"].const_value = model.graph.initializers["big"].const_value
    made = workshop.save(model)
    assert made.component.tensors["twin"] == made.component.tensors["big"]
    assert made.manifest.weights_bytes == BIG.nbytes


def test_a_new_tensor_is_on_disk_at_once_and_readable(workshop):
    output = workshop.writer()
    tensor = new_tensor(output, "big", BIG.copy())
    assert isinstance(tensor, StoredTensor)
    assert np.array_equal(tensor.numpy(), BIG)
    assert np.array_equal(values_of(load_onnx(workshop.save(model_with(big=tensor), output)))["big"], BIG)


def test_a_referenced_tensor_stays_in_its_file(workshop, tmp_path):
    file = tmp_path / "weights.bin"
    file.write_bytes(b"header" + BIG.tobytes())
    entry = workshop.store.reference(file)
    ref = TensorRef(file="weights.bin", offset=6, length=BIG.nbytes, dtype="float32", shape=BIG.shape)
    component = workshop.keep(model_with(big=referenced_tensor("big", file, ref, entry)))
    assert [path.name for path in workshop.staged()] == [component.files[ONNX_FILE].digest]
    assert component.files[component.tensors["big"].file].path == str(file)
    assert component.tensors["big"].offset == 6


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "bool", "int64"])
def test_data_types_survive(workshop, dtype):
    import ml_dtypes

    array = (BIG % 2).astype(getattr(ml_dtypes, dtype, dtype))
    array = np.tile(array, (4, 1))
    model = model_with(small=SMALL)
    value = ir.Value(name="odd", const_value=ir.Tensor(array, name="odd"), type=ir.TensorType(ir.Tensor(array).dtype))
    model.graph.register_initializer(value)
    found = values_of(load_onnx(workshop.save(model)))["odd"]
    assert found.dtype == array.dtype and np.array_equal(found, array)


def test_four_bit_integers_stay_in_the_graph(workshop):
    import ml_dtypes

    array = np.tile((BIG % 7).astype(ml_dtypes.int4), (6, 1))
    model = model_with(small=SMALL)
    model.graph.register_initializer(
        ir.Value(name="int4", const_value=ir.Tensor(array, name="int4"), type=ir.TensorType(ir.DataType.INT4))
    )
    made = workshop.save(model)
    assert not made.component.tensors
    assert np.array_equal(values_of(load_onnx(made))["int4"], array)


def test_companions_and_interface_are_those_of_the_input(workshop):
    made = workshop.save(model_with(small=SMALL))
    assert made.interface == workshop.empty.interface
    assert save_onnx(
        load_onnx(made), workshop.writer(), like=made, interface=Interface(max_length=4), execution={"a": 1}
    ).manifest.model_dump(include={"interface", "execution"}) == {
        "interface": Interface(max_length=4).model_dump(),
        "execution": {"a": 1},
    }


def test_an_initializer_without_a_value_is_refused(workshop):
    model = model_with(small=SMALL)
    model.graph.initializers["small"].const_value = None
    with pytest.raises(PipelineError, match="'small' has no value"):
        workshop.save(model)


def test_weights_of_subgraphs_stay_inside_where_runtimes_look_for_them(workshop):
    model = model_with(big=BIG)
    condition = ir.Value(
        name="c", const_value=ir.tensor(np.array(True), name="c"), type=ir.TensorType(ir.DataType.BOOL)
    )
    model.graph.register_initializer(condition)
    branches = {side: model_with(big=BIG + 1).graph for side in ("then_branch", "else_branch")}
    for branch in branches.values():
        branch.inputs.clear()
    model.graph.append(ir.node("If", [condition], branches))
    saved = workshop.save(model)
    assert set(saved.component.tensors) == {"big"}
    branch = next(n for n in load_onnx(saved).graph if n.op_type == "If").attributes["then_branch"].as_graph()
    np.testing.assert_array_equal(branch.initializers["big"].const_value.numpy(), BIG + 1)


def test_a_component_of_another_format_is_refused(workshop):
    manifest = workshop.empty.manifest.model_copy(update={"components": {"model": Component(format="torch")}})
    with pytest.raises(PipelineError, match="'torch', not onnx"):
        load_onnx(Artifact(manifest, workshop.store.blobs))


def test_bytes_that_the_manifest_does_not_name_are_refused(workshop):
    made = workshop.save(model_with(big=BIG))
    part = made.component.model_copy(update={"tensors": {}})
    manifest = made.manifest.model_copy(update={"components": {"model": part}})
    with pytest.raises(PipelineError, match="'big' outside, and the manifest does not say where"):
        load_onnx(Artifact(manifest, made.blobs))


def test_importing_the_names_loads_no_onnx():
    script = (
        "import sys; from pipeline import load_onnx, save_onnx; print({'onnx', 'onnx_ir', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]
    )
    assert done.stdout.strip() == "set()"
