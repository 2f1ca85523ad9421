"""Which weights of two artifacts are the same, and what is read to find out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tiny_models

from pipeline.artifact import Artifact, Component, Interface, Manifest, TensorRef
from pipeline.measure.weight_contents import contents_of, places_of


def artifact(folder: Path, **tensors: np.ndarray) -> Artifact:
    """A component of these tensors, one after another in one file."""
    folder.mkdir()
    refs, data = {}, b""
    for name, array in tensors.items():
        raw = array.tobytes()
        refs[name] = TensorRef(
            file="pack", offset=len(data), length=len(raw), dtype=str(array.dtype), shape=tuple(array.shape)
        )
        data += raw
    (folder / "pack").write_bytes(data)
    component = Component(format="onnx", files={"pack": tiny_models.entry_of(folder / "pack")}, tensors=refs)
    return Artifact(Manifest(format="onnx", components={"model": component}, interface=Interface()), folder)


A, B, C = (np.full(3000, value, np.float32) for value in (1, 2, 3))
LATE = np.concatenate([A[:-1], np.float32([9])])
"""Begins as A does, and ends otherwise."""


def content(found: Artifact, name: str) -> tuple[str, int, int]:
    ref = found.component.tensors[name]
    return found.component.files["pack"].digest, ref.offset, ref.length


def test_bytes_that_moved_are_the_same_and_others_are_not(tmp_path: Path) -> None:
    before, after = artifact(tmp_path / "a", a=A, b=B), artifact(tmp_path / "b", c=C, a=A)
    found = contents_of(before, after)
    assert found.of[content(before, "a")] == found.of[content(after, "a")]
    assert found.both.keys() == {content(before, "a"), content(after, "a")}
    assert found.of.keys() == places_of(before) | places_of(after)


def test_tensors_that_begin_alike_are_told_apart_by_their_ends(tmp_path: Path) -> None:
    before, after = artifact(tmp_path / "a", a=A), artifact(tmp_path / "b", late=LATE)
    assert contents_of(before, after).both == {}


def test_a_tensor_that_is_stored_once_more_is_the_one_that_was_there(tmp_path: Path) -> None:
    before = artifact(tmp_path / "a", a=A)
    twice = artifact(tmp_path / "b", b=B, first=A, second=A)
    found = contents_of(before, twice)
    assert len({found.of[content(before, "a")], *(found.of[content(twice, n)] for n in ("first", "second"))}) == 1
    assert len(found.both) == 3


def test_equal_places_are_not_read(tmp_path: Path) -> None:
    one = artifact(tmp_path / "a", a=A, b=B)
    (tmp_path / "a" / "pack").unlink()
    assert contents_of(one, one).both.keys() == places_of(one)


def test_tensors_of_other_lengths_are_not_read(tmp_path: Path) -> None:
    before, after = artifact(tmp_path / "a", a=A), artifact(tmp_path / "b", half=A.astype(np.float16))
    (tmp_path / "a" / "pack").unlink()
    (tmp_path / "b" / "pack").unlink()
    assert contents_of(before, after).both == {}
