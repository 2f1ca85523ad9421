"""An artifact as an ordinary folder that other tools can read, and back."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import BinaryIO

from pydantic import ValidationError

from pipeline.artifact import (
    MAIN_COMPONENT,
    ONNX_FILE,
    Artifact,
    Component,
    FileEntry,
    Manifest,
    TensorRef,
    map_tensor,
    safe_name,
)
from pipeline.errors import HostError, PipelineError
from pipeline.files import copy_file, sha256_of
from pipeline.store.writer import ALIGNMENT

MANIFEST = "pipeline.json"
DATA_FILE = f"{ONNX_FILE}.data"
"""The weights of all ONNX components: tools take them neither from outside the folder nor from a file of two names."""


def materialize(artifact: Artifact, folder: Path) -> None:
    """Write an independent copy of the artifact into the new folder `folder`.

    An ONNX component becomes `model.onnx` and `model.onnx.data`, which any tool loads. Of several, each is a graph of
    its own name (`prefill.onnx`) over one file of weights, in which those that they share are once; what else a
    component other than `model` has is in a folder of that name. The folder appears whole or not at all.

    Raises: HostError where the disk has too little room; FileExistsError where the folder exists.
    """
    need = artifact.manifest.size_bytes
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if need > free:
        raise HostError(f"writing the model to {folder} takes {need / 1e6:,.0f} MB and {free / 1e6:,.0f} MB are free")
    if folder.exists():
        raise FileExistsError(folder)
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        shared = {name: _copy(artifact, entry, aside, name) for name, entry in artifact.manifest.files.items()}
        weights = _Weights(aside / DATA_FILE)
        components = {
            part: _onnx_component(artifact, part, aside, weights)
            if component.format == "onnx"
            else _plain_component(artifact, part, aside)
            for part, component in artifact.manifest.components.items()
        }
        if (entry := weights.close()) is not None:
            for part, component in components.items():
                if component.tensors and component.format == "onnx":
                    components[part] = component.model_copy(update={"files": {**component.files, DATA_FILE: entry}})
        manifest = artifact.manifest.model_copy(update={"files": shared, "components": components})
        (aside / MANIFEST).write_text(manifest.model_dump_json(indent=1, exclude={"lineage"}), encoding="utf-8")
        aside.rename(folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def read_folder(folder: Path) -> Artifact:
    """The artifact in a folder that `materialize` wrote; the files are referenced where they lie.

    Raises: PipelineError where it is none, or a file is missing or shorter than its manifest says.
    """
    path = folder / MANIFEST
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise PipelineError(
            f"{folder} holds no exported model: {MANIFEST} is missing",
            hint="give the `model` folder of a run, for example runs/NAME/latest/model",
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        raise PipelineError(f"{path} is damaged: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None

    def place(file: Path, entry: FileEntry) -> FileEntry:
        if entry.path is not None:
            raise PipelineError(f"{path} names a file outside its folder: {entry.path}")
        if not file.resolve().is_relative_to(folder.resolve()):
            raise PipelineError(f"{file} is a link to a place outside its folder")
        if not file.is_file() or file.stat().st_size != entry.size_bytes:
            raise PipelineError(f"{file} is missing or incomplete")
        return entry.model_copy(update={"path": str(file.resolve())})

    components = {
        part: component.model_copy(
            update={
                "files": {
                    name: place(folder / _file_of(part, name, component), entry)
                    for name, entry in component.files.items()
                }
            }
        )
        for part, component in manifest.components.items()
    }
    files = {name: place(folder / safe_name(name), entry) for name, entry in manifest.files.items()}
    return Artifact(manifest.model_copy(update={"files": files, "components": components}), folder)


def _file_of(part: str, name: str, component: Component) -> str:
    """Where the file `name` of a component lies in the folder."""
    if component.format == "onnx" and name == ONNX_FILE:
        return f"{part}.onnx"
    if part == MAIN_COMPONENT or (component.format == "onnx" and name == DATA_FILE):
        return safe_name(name)
    return f"{part}/{safe_name(name)}"


def _copy(artifact: Artifact, entry: FileEntry, folder: Path, name: str) -> FileEntry:
    target = folder / safe_name(name)
    _refuse_if_there(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    copy_file(artifact.locate(entry), target)
    return entry.model_copy(update={"path": None, "mtime_ns": None})


def _refuse_if_there(target: Path) -> None:
    if target.exists() or target.name == MANIFEST:
        raise PipelineError(f"two files of the artifact would be called {target.name}")


def _plain_component(artifact: Artifact, part: str, folder: Path) -> Component:
    component = artifact.manifest.components[part]
    files = {
        name: _copy(artifact, entry, folder, _file_of(part, name, component)) for name, entry in component.files.items()
    }
    return component.model_copy(update={"files": files})


def _onnx_component(artifact: Artifact, part: str, folder: Path, weights: _Weights) -> Component:
    """Write the graph, over the file of weights that gets those that it does not have yet."""
    import onnx

    component = artifact.manifest.components[part]
    model = onnx.load(str(artifact.locate(component.files[ONNX_FILE])), load_external_data=False)
    tensors = {name: weights.place(artifact, component, ref) for name, ref in component.tensors.items()}
    for initializer in model.graph.initializer:
        if initializer.data_location != onnx.TensorProto.EXTERNAL:
            continue
        ref = tensors[initializer.name]
        del initializer.external_data[:]
        for key, value in (("location", DATA_FILE), ("offset", ref.offset), ("length", ref.length)):
            initializer.external_data.add(key=key, value=str(value))
    kept = {name: e for name, e in component.files.items() if name != ONNX_FILE and not name.startswith("weights/")}
    files = {name: _copy(artifact, entry, folder, _file_of(part, name, component)) for name, entry in kept.items()}
    graph = folder / _file_of(part, ONNX_FILE, component)
    _refuse_if_there(graph)
    graph.write_bytes(model.SerializeToString(deterministic=True))
    files[ONNX_FILE] = FileEntry(digest=sha256_of(graph), size_bytes=graph.stat().st_size)
    return component.model_copy(update={"files": files, "tensors": tensors})


class _Weights:
    """The one file of weights of a folder. Tensors that share bytes share them there, too."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        self._offsets: dict[tuple[str, int, int], int] = {}  # digest of the file that a tensor lay in, offset, length

    def place(self, artifact: Artifact, component: Component, ref: TensorRef) -> TensorRef:
        """Where the tensor lies, after its bytes were added if they were not there."""
        entry = component.files[ref.file]
        span = entry.digest, ref.offset, ref.length
        if span not in self._offsets:
            if self._file is None:
                _refuse_if_there(self._path)
                self._file = self._path.open("wb")
            self._file.write(bytes(-self._file.tell() % ALIGNMENT))
            self._offsets[span] = self._file.tell()
            raw = ref.model_copy(update={"dtype": "uint8", "shape": (ref.length,)})
            self._file.write(map_tensor(artifact.locate(entry), raw).data)
        return ref.model_copy(update={"file": DATA_FILE, "offset": self._offsets[span]})

    def close(self) -> FileEntry | None:
        """The file's entry; None where there was no tensor."""
        if self._file is None:
            return None
        self._file.close()
        return FileEntry(digest=sha256_of(self._path), size_bytes=self._path.stat().st_size)
