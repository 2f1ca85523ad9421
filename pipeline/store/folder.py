"""An artifact as an ordinary folder that other tools can read, and back."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from pydantic import ValidationError

from pipeline.artifact import ONNX_FILE, Artifact, Component, FileEntry, Manifest, TensorRef, map_tensor, safe_name
from pipeline.errors import HostError, PipelineError
from pipeline.files import copy_file, sha256_of
from pipeline.store.writer import ALIGNMENT

MANIFEST = "pipeline.json"
DATA_SUFFIX = ".data"


def materialize(artifact: Artifact, folder: Path) -> None:
    """Write an independent copy of the artifact into the new folder `folder`.

    ONNX components become `model.onnx` and `model.onnx.data`, which any tool loads; a component other than `model`
    gets a folder of its own. The folder appears whole or not at all.

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
        components = {}
        for part, component in artifact.manifest.components.items():
            home = aside if part == "model" else aside / part
            home.mkdir(exist_ok=True)
            write = _onnx_component if component.format == "onnx" else _plain_component
            components[part] = write(artifact, component, home)
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

    def place(entry_name: str, entry: FileEntry, home: Path) -> FileEntry:
        if entry.path is not None:
            raise PipelineError(f"{path} names a file outside its folder: {entry.path}")
        file = home / safe_name(entry_name)
        if not file.resolve().is_relative_to(folder.resolve()):
            raise PipelineError(f"{file} is a link to a place outside its folder")
        if not file.is_file() or file.stat().st_size != entry.size_bytes:
            raise PipelineError(f"{file} is missing or incomplete")
        return entry.model_copy(update={"path": str(file.resolve())})

    components = {
        part: component.model_copy(
            update={
                "files": {
                    name: place(name, entry, folder if part == "model" else folder / safe_name(part))
                    for name, entry in component.files.items()
                }
            }
        )
        for part, component in manifest.components.items()
    }
    files = {name: place(name, entry, folder) for name, entry in manifest.files.items()}
    return Artifact(manifest.model_copy(update={"files": files, "components": components}), folder)


def _copy(artifact: Artifact, entry: FileEntry, home: Path, name: str) -> FileEntry:
    target = home / safe_name(name)
    if target.exists() or target.name == MANIFEST:
        raise PipelineError(f"two files of the artifact would be called {name}")
    target.parent.mkdir(parents=True, exist_ok=True)
    copy_file(artifact.locate(entry), target)
    return entry.model_copy(update={"path": None, "mtime_ns": None})


def _plain_component(artifact: Artifact, component: Component, home: Path) -> Component:
    files = {name: _copy(artifact, entry, home, name) for name, entry in component.files.items()}
    return component.model_copy(update={"files": files})


def _onnx_component(artifact: Artifact, component: Component, home: Path) -> Component:
    import onnx

    model = onnx.load(str(artifact.locate(component.files[ONNX_FILE])), load_external_data=False)
    data_name = ONNX_FILE + DATA_SUFFIX
    places: dict[tuple[str, int, int], int] = {}  # tensors that share bytes share them in the copy, too
    tensors: dict[str, TensorRef] = {}
    with (home / data_name).open("wb") as data:
        for name, ref in component.tensors.items():
            span = (ref.file, ref.offset, ref.length)
            if span not in places:
                data.write(bytes(-data.tell() % ALIGNMENT))
                places[span] = data.tell()
                entry = component.files[ref.file]
                raw = ref.model_copy(update={"dtype": "uint8", "shape": (ref.length,)})
                data.write(map_tensor(artifact.locate(entry), raw).data)
            tensors[name] = ref.model_copy(update={"file": data_name, "offset": places[span]})
    for initializer in model.graph.initializer:
        if initializer.data_location != onnx.TensorProto.EXTERNAL:
            continue
        ref = tensors[initializer.name]
        del initializer.external_data[:]
        for key, value in (("location", data_name), ("offset", ref.offset), ("length", ref.length)):
            initializer.external_data.add(key=key, value=str(value))
    (home / ONNX_FILE).write_bytes(model.SerializeToString(deterministic=True))
    kept = {name: e for name, e in component.files.items() if name != ONNX_FILE and not name.startswith("weights/")}
    files = {name: _copy(artifact, entry, home, name) for name, entry in kept.items()}
    written = [ONNX_FILE, *([data_name] if tensors else [])]
    if not tensors:
        (home / data_name).unlink()
    for name in written:
        file = home / name
        files[name] = FileEntry(digest=sha256_of(file), size_bytes=file.stat().st_size)
    return component.model_copy(update={"files": files, "tensors": tensors})
