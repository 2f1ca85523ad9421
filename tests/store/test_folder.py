"""An exported model folder stands alone, is read back as it was, and cannot point outside itself."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from pydantic import ValidationError

from pipeline.artifact import Artifact, Interface, Manifest
from pipeline.errors import HostError, PipelineError
from pipeline.onnx_model import new_tensor, onnx_component
from pipeline.store import Store
from pipeline.store.folder import MANIFEST, materialize, read_folder
from pipeline.store.writer import OutputWriter

WEIGHT = np.arange(2048, dtype=np.float32).reshape(32, 64)


@pytest.fixture
def artifact(store: Store) -> Artifact:
    """y = x W, W stored outside the graph."""
    with store.staging() as staging:
        output = OutputWriter(staging)
        x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["B", 32]))
        w = ir.Value(name="W", const_value=new_tensor(output, "W", WEIGHT), shape=ir.Shape([32, 64]))
        w.type = ir.TensorType(ir.DataType.FLOAT)
        node = ir.node("MatMul", [x, w])
        node.outputs[0].name = "y"
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        node.outputs[0].shape = ir.Shape(["B", 64])
        graph = ir.Graph([x], [node.outputs[0]], nodes=[node], initializers=[w], opset_imports={"": 20}, name="g")
        part = onnx_component(ir.Model(graph, ir_version=10), output)
        files = {"config.json": output.file("config.json", b"{}")}
        made = Manifest(format="onnx", components={"model": part}, files=files, interface=Interface())
        return store.publish(staging, made)


def test_the_copy_is_an_ordinary_onnx_model(artifact: Artifact, tmp_path: Path) -> None:
    import onnxruntime

    materialize(artifact, tmp_path / "model")
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == [
        "config.json",
        "model.onnx",
        "model.onnx.data",
        MANIFEST,
    ]
    onnx.checker.check_model(str(tmp_path / "model" / "model.onnx"))
    session = onnxruntime.InferenceSession(str(tmp_path / "model" / "model.onnx"))
    x = np.eye(2, 32, dtype=np.float32)
    np.testing.assert_array_equal(session.run(None, {"x": x})[0], WEIGHT[:2])


def test_a_copy_is_read_back_as_it_was(artifact: Artifact, tmp_path: Path) -> None:
    materialize(artifact, tmp_path / "model")
    found = read_folder(tmp_path / "model")
    np.testing.assert_array_equal(found.tensor("W"), WEIGHT)
    assert found.interface == artifact.interface
    assert found.read_json("config.json") == {}


def test_the_copy_does_not_need_the_store(artifact: Artifact, store: Store, tmp_path: Path) -> None:
    materialize(artifact, tmp_path / "model")
    for blob in [p for p in store.blobs.rglob("*") if p.is_file()]:
        blob.unlink()
    assert read_folder(tmp_path / "model").tensor("W").sum() == WEIGHT.sum()


@pytest.fixture
def two(artifact: Artifact, store: Store) -> Artifact:
    """Two components of the same graph and weights, one of which has a further file."""
    with store.staging() as staging:
        entry = OutputWriter(staging).file("note.json", b"{}")
        other = artifact.component.model_copy(update={"files": {**artifact.component.files, "note.json": entry}})
        components = {"prefill": artifact.component, "decode": other}
        return store.publish(staging, artifact.manifest.model_copy(update={"components": components}))


def test_several_graphs_share_one_file_of_weights(two: Artifact, tmp_path: Path) -> None:
    import onnxruntime

    materialize(two, tmp_path / "model")
    files = {str(p.relative_to(tmp_path / "model")) for p in (tmp_path / "model").rglob("*") if p.is_file()}
    assert files == {"config.json", "prefill.onnx", "decode.onnx", "decode/note.json", "model.onnx.data", MANIFEST}
    assert (tmp_path / "model" / "model.onnx.data").stat().st_size == WEIGHT.nbytes
    for part in ("prefill", "decode"):
        session = onnxruntime.InferenceSession(str(tmp_path / "model" / f"{part}.onnx"))
        np.testing.assert_array_equal(session.run(None, {"x": np.eye(2, 32, dtype=np.float32)})[0], WEIGHT[:2])


def test_several_graphs_are_read_back_as_they_were(two: Artifact, tmp_path: Path) -> None:
    materialize(two, tmp_path / "model")
    found = read_folder(tmp_path / "model")
    assert set(found.manifest.components) == {"prefill", "decode"}
    for part in found.manifest.components:
        np.testing.assert_array_equal(found.tensor("W", part), WEIGHT)
    note = found.manifest.components["decode"].files["note.json"]
    assert found.locate(note) == tmp_path / "model" / "decode" / "note.json"


@pytest.mark.parametrize("name", ["prefill.onnx", "model.onnx.data"])
def test_a_companion_cannot_take_the_place_of_a_graph_or_its_weights(name: str, two: Artifact, tmp_path: Path) -> None:
    files = {**two.manifest.files, name: two.manifest.files["config.json"]}
    both = Artifact(two.manifest.model_copy(update={"files": files}), two.blobs)
    with pytest.raises(PipelineError, match=f"two files of the artifact would be called {name}"):
        materialize(both, tmp_path / "model")


def test_a_folder_that_is_there_is_not_overwritten(artifact: Artifact, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(FileExistsError):
        materialize(artifact, tmp_path / "model")


def test_too_little_room_is_said_before_anything_is_written(
    artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.store.folder.shutil.disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(HostError, match="and 0 MB are free"):
        materialize(artifact, tmp_path / "out" / "model")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_copy_that_fails_leaves_nothing(artifact: Artifact, tmp_path: Path) -> None:
    blob = artifact.file("config.json")
    assert blob is not None
    blob.unlink()
    with pytest.raises(FileNotFoundError):
        materialize(artifact, tmp_path / "out" / "model")
    assert list((tmp_path / "out").iterdir()) == []


def test_what_is_no_exported_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"pipeline.json is missing\n  give the `model` folder of a run"):
        read_folder(tmp_path)


def test_a_link_to_a_file_outside_is_refused(artifact: Artifact, tmp_path: Path) -> None:
    materialize(artifact, tmp_path / "model")
    data = tmp_path / "model" / "model.onnx.data"
    data.rename(tmp_path / "elsewhere")
    data.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PipelineError, match="a link to a place outside"):
        read_folder(tmp_path / "model")


def test_a_component_cannot_be_named_as_a_path(artifact: Artifact) -> None:
    with pytest.raises(ValidationError, match="should match pattern"):
        Manifest(format="onnx", components={"../../esc": artifact.component}, interface=Interface())


def test_two_files_of_one_name_are_refused(artifact: Artifact, tmp_path: Path) -> None:
    files = {**artifact.manifest.files, MANIFEST: artifact.manifest.files["config.json"]}
    both = Artifact(artifact.manifest.model_copy(update={"files": files}), artifact.blobs)
    with pytest.raises(PipelineError, match=r"two files of the artifact would be called pipeline\.json"):
        materialize(both, tmp_path / "model")


def test_a_missing_or_cut_file_is_named(artifact: Artifact, tmp_path: Path) -> None:
    materialize(artifact, tmp_path / "model")
    (tmp_path / "model" / "model.onnx.data").write_bytes(b"cut")
    with pytest.raises(PipelineError, match=r"model.onnx.data is missing or incomplete"):
        read_folder(tmp_path / "model")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["files"]["config.json"].update(path="/etc/passwd"), "names a file outside its folder"),
        (lambda m: m["files"].update({"../../x": m["files"]["config.json"]}), "would leave its folder"),
        (lambda m: m.update(surprise=1), "is damaged: surprise"),
    ],
)
def test_a_strangers_manifest_cannot_reach_outside(
    change: object, message: str, artifact: Artifact, tmp_path: Path
) -> None:
    materialize(artifact, tmp_path / "model")
    path = tmp_path / "model" / MANIFEST
    manifest = json.loads(path.read_text())
    change(manifest)  # type: ignore[operator]
    path.write_text(json.dumps(manifest))
    with pytest.raises(PipelineError, match=message):
        read_folder(tmp_path / "model")
