"""An artifact as Olive takes a model, and what Olive gives back as an artifact."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from passes.graph.weights_aside import execution_of_graph
from pipeline import (
    Artifact,
    Component,
    FileEntry,
    Interface,
    Manifest,
    PassContext,
    PipelineError,
    RecipeError,
    checkpoint_folder,
    load_onnx,
    materialize,
    read_onnx_file,
    read_weights,
    save_onnx,
    weight_files,
)

if TYPE_CHECKING:
    import onnx_ir as ir

ADDITIONAL = "additional_files"
CONFIG = "config.json"
FORGOTTEN = ("_name_or_path",)
"""Keys of a config.json that say where it came from: two runs would differ."""

PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl"})
INLINE_BYTES = 1024
"""Initializers up to this size stay inside the graph."""

CHUNK_BYTES = 1 << 22


@contextmanager
def handler_of(artifact: Artifact, folder: Path, *, task: str) -> Iterator[Any]:
    """The artifact as Olive's handler. A graph is copied below `folder`; of a checkpoint there are links.

    Raises: PipelineError where the artifact is more than a checkpoint or one graph.
    """
    from olive.model import HfModelHandler, ONNXModelHandler

    if artifact.format == "torch":
        if artifact.manifest.transforms:
            raise PipelineError("Olive reads a checkpoint's files, and this artifact changes its modules when it loads")
        trusted = bool(artifact.manifest.execution.get("trust_remote_code", False))
        with checkpoint_folder(artifact) as checkpoint:
            yield HfModelHandler(
                model_path=str(checkpoint), task=task, load_kwargs={"trust_remote_code": True} if trusted else None
            )
        return
    _ = artifact.component  # of several, it says so
    home = folder / "input"
    materialize(artifact, home)
    companions = [str(home / name) for name in artifact.manifest.files]
    attributes = {**artifact.read_json(CONFIG), ADDITIONAL: companions}
    yield ONNXModelHandler(model_path=str(home), onnx_file_name="model.onnx", model_attributes=attributes)


def artifact_of(handler: Any, artifact: Artifact, context: PassContext) -> tuple[Artifact, Path]:
    """(what Olive made of `artifact`, the graph or the folder that it wrote).

    Raises: PipelineError where it wrote no file, or what no artifact can hold.
    """
    from olive.model import HfModelHandler, ONNXModelHandler

    if isinstance(handler, ONNXModelHandler):
        path = Path(handler.model_path or "")
        if not path.is_file():
            raise PipelineError("Olive says that it wrote an ONNX model, and there is none")
        return _graph(path, _additional(handler, path.parent), artifact, context), path
    if isinstance(handler, HfModelHandler):
        if handler.adapter_path:
            raise PipelineError("Olive made adapters beside a model, which no artifact here holds")
        folder = Path(handler.model_path or "")
        if not (folder / CONFIG).is_file():
            raise PipelineError("Olive says that it wrote a model folder, and there is no config.json")
        return _checkpoint(folder, artifact, context), folder
    raise PipelineError(f"Olive gave a {type(handler).__name__}, which no artifact here holds")


def _additional(handler: Any, home: Path) -> dict[str, Path]:
    """Name -> file of what Olive says belongs to the model besides its graph."""
    found: dict[str, Path] = {}
    for given in (handler.model_attributes or {}).get(ADDITIONAL) or ():
        path = Path(given)
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                found[str(file.relative_to(home)) if file.is_relative_to(home) else file.name] = file
    return found


def _graph(path: Path, additional: Mapping[str, Path], artifact: Artifact, context: PassContext) -> Artifact:
    import onnx_ir as ir

    model = ir.load(path)
    if artifact.format == "onnx":
        before = load_onnx(artifact)
        if renamed := _name_outputs_as_before(model, before):
            context.logger.info("Olive renamed outputs; they have their names again: %s", ", ".join(renamed))
            ir.save(model, path)  # tried out as it is kept
    _take_in_small(model)
    if artifact.format == "onnx":
        same = _refer_to_unchanged(model, before)
        context.logger.info("%d weights are those of the graph before", same)
    files = {**artifact.manifest.files, **_written(additional, artifact, context)}
    made = save_onnx(
        model,
        context.output,
        like=artifact,
        interface=_interface(model, path, artifact),
        execution=execution_of_graph(artifact) if artifact.format == "onnx" else {},
    )
    return Artifact(made.manifest.model_copy(update={"files": dict(sorted(files.items()))}), made.blobs)


def _take_in_small(model: ir.Model) -> None:
    """Read what an artifact keeps inside its graph: small tensors, those of subgraphs, nodes and less than a byte."""
    import numpy as np
    import onnx_ir as ir

    def taken_in(tensor: Any) -> Any:
        return ir.Tensor(np.array(tensor.numpy()), dtype=tensor.dtype, name=tensor.name)

    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if not isinstance(tensor, ir.ExternalTensor):
                continue
            if graph is not model.graph or tensor.nbytes <= INLINE_BYTES or tensor.dtype.bitwidth < 8:
                value.const_value = taken_in(tensor)
        for node in graph:
            for name, attribute in list(node.attributes.items()):
                if isinstance(attribute.value, ir.ExternalTensor):
                    node.attributes[name] = ir.AttrTensor(name, taken_in(attribute.value))


def _name_outputs_as_before(model: ir.Model, before: ir.Model) -> list[str]:
    """Give outputs their names again where as many stand in their places under new ones; which ones.

    Some of Olive's quantizers rename what a product yields, even where it is the graph's output.
    """
    old, new = [str(v.name) for v in before.graph.outputs], [str(v.name) for v in model.graph.outputs]
    if (
        len(old) != len(new)
        or old == new
        or set(old) & set(new) != {o for o, n in zip(old, new, strict=True) if o == n}
    ):
        return []
    renamed = []
    for name, value in zip(old, model.graph.outputs, strict=True):
        if value.name != name:
            value.name = name
            renamed.append(name)
    return renamed


def _refer_to_unchanged(model: ir.Model, old: ir.Model) -> int:
    """Have weights that Olive left as they were refer to the bytes that are stored already; how many there are."""
    before = old.graph.initializers
    count = 0
    for name, value in model.graph.initializers.items():
        known = before[name].const_value if name in before else None
        made = value.const_value
        if known is None or made is None or (known.dtype, known.shape) != (made.dtype, made.shape):
            continue
        if bytes_equal(known, made):
            value.const_value = known
            count += 1
    return count


def bytes_equal(one: ir.TensorProtocol, other: ir.TensorProtocol) -> bool:
    """Whether two tensors of one type and shape hold the same bytes: NaN equals itself, -0 is not 0."""
    import numpy as np
    import onnx_ir as ir

    if one.dtype == ir.DataType.STRING:
        return False
    arrays = [np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8) for tensor in (one, other)]
    return bool(np.array_equal(arrays[0], arrays[1]))


def _interface(model: ir.Model, path: Path, artifact: Artifact) -> Interface:
    """How the graph is called: as before, if its inputs and outputs are the same, else as its names tell.

    Raises: PipelineError where they do not.
    """
    if artifact.format == "onnx" and (kept := _as_before(model, artifact.interface)) is not None:
        return kept
    companions = {name: file for name in artifact.manifest.files if (file := artifact.file(name)) is not None}
    try:
        return read_onnx_file(path, companions).interface
    except RecipeError as error:
        what = error.message.replace(str(path), "the graph that Olive made")
        raise PipelineError(what, hint=error.hint) from None


def _as_before(model: ir.Model, before: Interface) -> Interface | None:
    """The interface before, with the data type that the cache has now; None where names are missing or new."""
    inputs = {str(value.name): value for value in model.graph.inputs}
    outputs = {str(value.name): value for value in model.graph.outputs}
    called = {*before.inputs.values(), *filter(None, (before.logits_to_keep,))}
    if inputs.keys() != called or not set(before.outputs.values()) <= outputs.keys():
        return None
    if before.cache is None:
        return before
    pasts = [inputs[name] for role, name in before.inputs.items() if role.startswith("past.")]
    dtypes = {value.dtype.numpy().name for value in pasts if value.dtype is not None}
    if len(dtypes) != 1:
        return None
    return before.model_copy(update={"cache": before.cache.model_copy(update={"dtype": dtypes.pop()})})


def _checkpoint(folder: Path, artifact: Artifact, context: PassContext) -> Artifact:
    if pickles := sorted(file.name for file in folder.rglob("*") if file.suffix in PICKLES):
        raise PipelineError(f"Olive saved {pickles[0]}, a pickle that can run code when it is opened")
    try:
        names = weight_files(folder)
        tensors = read_weights(folder, names)
    except RecipeError as error:
        raise PipelineError(f"Olive saved no model that can be read: {error.message}") from None
    weights = {name: _copied(folder / name, context) for name in names}
    made = {
        str(file.relative_to(folder)): file
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name not in names and not file.name.endswith(".safetensors.index.json")
    }
    config = json.loads(made.pop(CONFIG).read_text(encoding="utf-8"))
    config = {key: value for key, value in config.items() if key not in FORGOTTEN}
    before = artifact.manifest.files
    new = {name: file for name, file in made.items() if name not in before}  # a tokenizer saved anew is no other one
    execution = {key: value for key, value in artifact.manifest.execution.items() if key != "dtype"}
    if isinstance(dtype := config.get("dtype") or config.get("torch_dtype"), str):
        execution["dtype"] = dtype
    text = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    files = {**before, **_written(new, artifact, context), CONFIG: context.output.file(CONFIG, text)}
    manifest = Manifest(
        format="torch",
        components={"model": Component(format="torch", files=weights, tensors=tensors)},
        files=dict(sorted(files.items())),
        interface=artifact.interface,
        execution=execution,
    )
    return Artifact(manifest, artifact.blobs)


def _written(files: Mapping[str, Path], artifact: Artifact, context: PassContext) -> dict[str, FileEntry]:
    """Entries of the files; one that is as before keeps the entry that it had."""
    entries = {}
    for name, file in files.items():
        before = artifact.file(name) if name in artifact.manifest.files else None
        if before is not None and before.read_bytes() == file.read_bytes():
            entries[name] = artifact.manifest.files[name]
        else:
            entries[name] = _copied(file, context)
    return entries


def _copied(file: Path, context: PassContext) -> FileEntry:
    stream = context.output.stream()
    with file.open("rb") as source:
        while chunk := source.read(CHUNK_BYTES):
            stream.write(chunk)
    return stream.close()
