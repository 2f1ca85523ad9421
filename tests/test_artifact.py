"""Artifacts: their digest, their names, their mapped tensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.artifact import (
    Artifact,
    Component,
    FileEntry,
    Interface,
    Lineage,
    Manifest,
    TensorRef,
    canonical_json,
    map_tensor,
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def manifest(**changes: object) -> Manifest:
    files = {"w": FileEntry(digest="a" * 64, size_bytes=8)}
    tensors = {"t": TensorRef(file="w", offset=0, length=8, dtype="float32", shape=(2,))}
    part = Component(format="onnx", files=files, tensors=tensors)
    fields = {"format": "onnx", "components": {"model": part}, "interface": Interface(), **changes}
    return Manifest(**fields)  # type: ignore[arg-type]


def with_file(entry: FileEntry) -> Manifest:
    return manifest(components={"model": Component(format="onnx", files={"w": entry})})


def test_the_digest_does_not_depend_on_history_or_place() -> None:
    lineage = Lineage(stage_key="k", stage="s", pass_name="p")
    assert manifest(lineage=lineage).digest() == manifest().digest()
    here = FileEntry(digest="b" * 64, size_bytes=1, path="/here/w", mtime_ns=1)
    there = FileEntry(digest="b" * 64, size_bytes=1, path="/there/w", mtime_ns=2)
    assert with_file(here).digest() == with_file(there).digest()


def test_the_digest_depends_on_contents_names_and_execution() -> None:
    digests = {
        manifest().digest(),
        manifest(execution={"dtype": "float16"}).digest(),
        manifest(files={"config.json": FileEntry(digest="c" * 64, size_bytes=1)}).digest(),
        with_file(FileEntry(digest="b" * 64, size_bytes=1)).digest(),
        with_file(FileEntry(digest="c" * 64, size_bytes=1)).digest(),
    }
    assert len(digests) == 5


def test_a_manifest_survives_json() -> None:
    assert Manifest.model_validate_json(manifest().model_dump_json()) == manifest()


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../b", "", "a\\b", "a\0b"])
def test_a_file_name_that_leaves_its_folder_is_refused(name: str) -> None:
    with pytest.raises(ValidationError, match="leave its folder"):
        Component(format="onnx", files={name: FileEntry(digest="a" * 64, size_bytes=1)})


def test_tensors_that_share_bytes_count_once() -> None:
    ref = TensorRef(file="w", offset=0, length=8, dtype="float32", shape=(2,))
    files = {"w": FileEntry(digest="a" * 64, size_bytes=100), "model.onnx": FileEntry(digest="b" * 64, size_bytes=5)}
    part = Component(format="onnx", files=files, tensors={"a": ref, "b": ref})
    made = manifest(components={"model": part})
    assert made.weights_bytes == 8
    assert made.size_bytes == 13


@pytest.mark.parametrize("offset", [0, 1, 3, 4096, 4099])
def test_a_tensor_is_mapped_from_any_offset(offset: int, tmp_path: Path) -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    file = tmp_path / "w"
    file.write_bytes(bytes(offset) + values.tobytes())
    ref = TensorRef(file="w", offset=offset, length=24, dtype="float32", shape=(2, 3))
    mapped = map_tensor(file, ref)
    np.testing.assert_array_equal(mapped, values)
    assert not mapped.flags.writeable


def test_bfloat16_is_mapped_without_conversion(tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(bytes([0x80, 0x3F, 0x00, 0x40]))  # 1.0, 2.0
    ref = TensorRef(file="w", offset=0, length=4, dtype="bfloat16", shape=(2,))
    assert map_tensor(tmp_path / "w", ref).astype(np.float32).tolist() == [1.0, 2.0]


def test_an_artifact_finds_shared_files_and_those_of_its_component(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"a": 1}')
    entry = FileEntry(digest="d" * 64, size_bytes=8, path=str(tmp_path / "config.json"))
    artifact = Artifact(manifest(files={"config.json": entry}), tmp_path / "blobs")
    assert artifact.read_json("config.json") == {"a": 1}
    assert artifact.file("w") == tmp_path / "blobs" / "aa" / ("a" * 64)
    assert artifact.file("tokenizer.json") is None


@given(JSON)
def test_canonical_json_is_one_text_for_one_value(value: object) -> None:
    if isinstance(value, dict):
        assert canonical_json(dict(reversed(value.items()))) == canonical_json(value)
    assert canonical_json(value) == canonical_json(value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_canonical_json_refuses_what_json_cannot_say(value: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json({"a": value})
