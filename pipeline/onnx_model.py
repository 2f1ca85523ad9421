"""ONNX components as onnx_ir models whose weights stay where they lie.

`load_onnx` gives a model that a pass may edit; its initializers map the files that the artifact names. `save_onnx`
writes the edited graph: an initializer that was not touched is referenced where it lay, a new one goes to the pack.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.artifact import (
    MAIN_COMPONENT,
    ONNX_FILE,
    Artifact,
    Component,
    FileEntry,
    Interface,
    Manifest,
    TensorRef,
)
from pipeline.errors import PipelineError
from pipeline.onnx_wire import check_external_tensors
from pipeline.store.writer import OutputWriter, weights_name

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    from pipeline.stored_tensor import StoredTensor as StoredTensor  # noqa: PLC0414 - a public name of this module

INLINE_BYTES = 1024
"""Initializers up to this size stay inside model.onnx, where the optimizers can see their values."""


def __getattr__(name: str) -> Any:
    if name != "StoredTensor":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pipeline.stored_tensor import StoredTensor

    return StoredTensor


def load_onnx(artifact: Artifact, component: str = MAIN_COMPONENT) -> ir.Model:
    """The graph of an ONNX component, its external initializers mapped.

    Raises: PipelineError where there is no such component, it has no ONNX graph, or the graph names bytes that the
    manifest does not.
    """
    import onnx_ir as ir

    from pipeline.stored_tensor import StoredTensor

    part = artifact.manifest.components.get(component)
    if part is None:
        names = ", ".join(sorted(artifact.manifest.components))
        raise PipelineError(
            f"the artifact's components are {names}, and none is {component!r}",
            hint="a pass that takes one graph goes before those that put several together",
        )
    if ONNX_FILE not in part.files:
        raise PipelineError(f"component {component!r} has format {part.format!r}, not onnx")
    path = artifact.locate(part.files[ONNX_FILE])
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        check_external_tensors(data, part.tensors)
    model = ir.load(path)
    for graph in model.graphs():
        for name, value in graph.initializers.items():
            if not isinstance(value.const_value, ir.ExternalTensor):
                continue
            ref = part.tensors.get(name)
            if ref is None:
                raise PipelineError(
                    f"{ONNX_FILE} keeps initializer {name!r} outside, and the manifest does not say where"
                )
            entry = part.files[ref.file]
            value.const_value = StoredTensor(name, artifact.locate(entry), ref, entry)
    return model


def new_tensor(output: OutputWriter, name: str, array: np.ndarray) -> ir.TensorProtocol:
    """A tensor for the graph: small ones in memory, others streamed to the pack at once, so that `array` can go."""
    import onnx_ir as ir

    from pipeline.stored_tensor import StoredTensor

    if array.nbytes <= INLINE_BYTES:
        return ir.Tensor(array, name=name)
    ref = output.tensor(array)
    return StoredTensor(name, output.pack_path(), ref, None)


def referenced_tensor(name: str, path: Path, ref: TensorRef, entry: FileEntry) -> ir.TensorProtocol:
    """A tensor for the graph whose bytes lie in a file of another artifact, such as a checkpoint."""
    from pipeline.stored_tensor import StoredTensor

    return StoredTensor(name, path, ref.model_copy(update={"file": weights_name(entry)}), entry)


def reshaped_tensor(name: str, tensor: ir.TensorProtocol, shape: tuple[int, ...]) -> ir.TensorProtocol:
    """The same bytes for another place of the graph that wants another shape; they are stored once."""
    import onnx_ir as ir

    from pipeline.stored_tensor import StoredTensor

    if not isinstance(tensor, StoredTensor):
        return ir.Tensor(tensor.numpy().reshape(shape), dtype=tensor.dtype, name=name)
    return StoredTensor(name, tensor.path, tensor.ref.model_copy(update={"shape": shape}), tensor.entry)


def onnx_component(model: ir.Model, output: OutputWriter) -> Component:
    """Write the graph and the initializers that are new, and return the component. `model` is used up.

    Weights of subgraphs stay inside the graph. Raises: PipelineError where an initializer has no value.
    """
    import onnx_ir as ir

    from pipeline.stored_tensor import StoredTensor

    holders: dict[str, tuple[ir.Value, StoredTensor]] = {}
    for graph in model.graphs():
        for name, value in graph.initializers.items():
            tensor = value.const_value
            if tensor is None:
                raise PipelineError(f"initializer {name!r} has no value")
            if graph is not model.graph:  # no runtime takes the weights of a subgraph from outside
                if isinstance(tensor, StoredTensor):
                    value.const_value = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=name)
                continue
            if not isinstance(tensor, StoredTensor):
                packed = tensor.dtype == ir.DataType.STRING or tensor.dtype.bitwidth < 8  # numpy's bytes are not ONNX's
                if packed or tensor.nbytes <= INLINE_BYTES:
                    continue
                tensor = new_tensor(output, name, tensor.numpy())
            assert isinstance(tensor, StoredTensor)
            holders[name] = value, tensor
    pack = output.close_pack()
    sources: dict[str, FileEntry] = {}
    external: dict[str, TensorRef] = {}
    for name, (value, tensor) in holders.items():
        if tensor.entry is not None:
            file, entry = weights_name(tensor.entry), tensor.entry
        else:
            assert pack is not None
            file, entry = pack
        sources[file] = entry
        external[name] = tensor.ref.model_copy(update={"file": file})
        value.const_value = ir.ExternalTensor(
            file, tensor.ref.offset, tensor.ref.length, tensor.dtype, shape=tensor.shape, name=name
        )
    data = ir.to_proto(model).SerializeToString(deterministic=True)
    files = {ONNX_FILE: output.file(ONNX_FILE, data), **dict(sorted(sources.items()))}
    return Component(format="onnx", files=files, tensors=dict(sorted(external.items())))


def save_onnx(
    model: ir.Model,
    output: OutputWriter,
    *,
    like: Artifact,
    interface: Interface | None = None,
    component: str = MAIN_COMPONENT,
    execution: Mapping[str, Any] | None = None,
) -> Artifact:
    """An ONNX artifact of this graph.

    Companions (config, tokenizer …) and, where not given, interface and execution are those of `like`.
    """
    manifest = Manifest(
        format="onnx",
        components={component: onnx_component(model, output)},
        files=like.manifest.files,
        interface=interface or like.interface,
        execution=dict(execution if execution is not None else like.manifest.execution),
    )
    return Artifact(manifest, like.blobs)
