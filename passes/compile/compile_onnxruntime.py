"""A graph as ONNX Runtime would hold it in memory on this CPU: optimized to the last level, weights already packed."""

from __future__ import annotations

import ctypes
import json
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from passes.graph.agreement import Outputs, check_agreement, outputs_of
from passes.graph.offline import DATA_FILE, open_session, optimize_offline, session_options
from passes.graph.weights_aside import execution_of_graph, keep_used_opsets, original_of, put_back
from pipeline import (
    Artifact,
    Field,
    Interface,
    ModelSize,
    Pass,
    PassContext,
    PassParams,
    Prediction,
    TensorRef,
    load_onnx,
    new_tensor,
    save_onnx,
)

if TYPE_CHECKING:
    import onnx_ir as ir

COMPILED_FILE = "compiled.json"
"""Beside the graph: which weights have a packed form, and where. Kept apart, so that the graph is one for any tool."""

PACKED = "prepacked_"
"""Prefix of the keys by which ONNX Runtime finds packed forms in a weight's external data."""

TOLERANCE = 1e-3
"""Largest difference from the graph before, as a share of an output's standard deviation."""


class CompileOnnxRuntime(Pass):
    """Optimize for this very CPU and keep ONNX Runtime's packed weights, so that loading maps them."""

    name, version = "compile_onnxruntime", 1
    accepts, produces = frozenset({"onnx"}), "onnx"
    libraries = ("onnxruntime", "onnx", "onnx-ir")
    depends_on = ("host.cpu", "host.instruction_sets")
    comes_after = dict.fromkeys(
        (
            "equalize_channels",
            "fuse_transformer",
            "join_products",
            "onnxoptimizer",
            "optimize_onnxruntime",
            "quantize_dynamic",
            "quantize_static",
            "quantize_weights",
        ),
        "the weights that it packs for this CPU are those of the graph that it leaves, which nothing may change then",
    )

    class Params(PassParams):
        prepack: bool = Field(
            True,
            description="keep the weights in the form that the kernels read, beside the plain one: loading is faster "
            "and takes less memory that others cannot share, the artifact is larger",
        )

    @classmethod
    def predict(cls, params: Params, model: ModelSize) -> Prediction:
        """Packed weights are mapped when they are loaded. Packing quantized ones takes about 1.65 times their bytes, as
        measured; what float ones take is not known.
        """
        after = model.model_copy(update={"prepacked": params.prepack})
        if not model.linear.dtype.startswith("int"):
            return Prediction(model=after)
        products = model.linear.size_bytes + model.head.size_bytes
        return Prediction(model=after, conversion_bytes=84 * 10**6 + products * 165 // 100)

    def run(self, artifact: Artifact, params: Params, context: PassContext) -> Artifact:
        """Save the graph and the packed weights, load both ways, compare.

        Raises: PipelineError where ONNX Runtime refuses the graph, or the compiled one computes something else.
        """
        import onnx_ir as ir

        model = load_onnx(artifact)
        original = original_of(model)
        context.progress(0.1, "optimizing for this CPU")
        config = {"session.save_external_prepacked_constant_initializers": "1"} if params.prepack else {}
        with context.output.scratch() as folder:
            path = optimize_offline(model, folder, level="all", threads=context.threads, config=config)
            packed = _take_packed(path)
            made: ir.Model = ir.load(path)
            context.progress(0.4, "writing")
            record, parts = _keep_packed(made, packed, folder / DATA_FILE, context)
            put_back(made, original, context, tool="ONNX Runtime")
        keep_used_opsets(made)
        context.progress(0.7, "comparing")
        _compare(model, made, _entries(record, parts), artifact, context)
        facts = {
            "cpu": context.facet("host.cpu"),
            "instruction_sets": context.facet("host.instruction_sets"),
            "onnxruntime": version("onnxruntime"),
        }
        described = {**facts, "layout": "com.microsoft.nchwc" in made.opset_imports, "weights": record}
        saved = save_onnx(
            made, context.output, like=artifact, execution={**execution_of_graph(artifact), "compiled": facts}
        )
        return _with_packed(saved, described, parts, context)


class _Packed(NamedTuple):
    """One packed form of a weight: ONNX Runtime's key for it, and (offset, length, checksum) of its parts."""

    key: str
    parts: list[tuple[int, int, str]]


def _take_packed(path: Path) -> dict[str, dict[str, _Packed]]:
    """Take the packed forms out of a saved graph: weight -> entry of its external data -> packed form.

    ONNX Runtime writes them as `KEY|OFFSET;LENGTH;CHECKSUM|…`, which no other reader of ONNX knows.
    """
    import onnx

    found: dict[str, dict[str, _Packed]] = {}
    model = onnx.load(path, load_external_data=False)
    for initializer in model.graph.initializer:
        entries = [(entry.key, entry.value) for entry in initializer.external_data]
        del initializer.external_data[:]
        for entry, value in entries:
            if not entry.startswith(PACKED):
                initializer.external_data.add(key=entry, value=value)
                continue
            key, *parts = value.split("|")
            numbers = [part.split(";") for part in parts]
            packed = _Packed(key, [(int(offset), int(length), checksum) for offset, length, checksum in numbers])
            found.setdefault(initializer.name, {})[entry] = packed
    path.write_bytes(model.SerializeToString())
    return found


def _keep_packed(
    model: ir.Model, packed: dict[str, dict[str, _Packed]], data: Path, context: PassContext
) -> tuple[dict[str, Any], dict[str, TensorRef]]:
    """Write each weight that has packed forms, and those, into the artifact's own file.

    ONNX Runtime looks for both in one file, so that such a weight cannot be referred to where it lay. It saves packed
    forms at any offset, but its kernels find their parts from an aligned address on: what it saved reads as garbage
    unless it is moved to where it is aligned, as all tensors of an artifact are.

    Returns the record for the runner, and the places of the parts.
    """
    import numpy as np
    import onnx_ir as ir

    record: dict[str, Any] = {}
    places: dict[str, TensorRef] = {}
    for name, value in sorted(model.graph.initializers.items()):
        if name not in packed or value.const_value is None:
            continue
        value.const_value = new_tensor(context.output, name, value.const_value.numpy())
        if not isinstance(value.const_value, ir.LazyTensor):  # so small that it is in the graph
            continue
        record[name] = {}
        for entry, form in packed[name].items():
            names = [f"{name}.{entry}.{count}" for count in range(len(form.parts))]
            for part, (offset, length, _) in zip(names, form.parts, strict=True):
                places[part] = context.output.tensor(
                    np.memmap(data, np.uint8, "r", offset, (length,)) if length else np.empty(0, np.uint8)
                )
            checksums = [checksum for _, _, checksum in form.parts]
            record[name][entry] = {"key": form.key, "parts": names, "checksums": checksums}
    return record, places


def _with_packed(
    artifact: Artifact, record: dict[str, Any], parts: dict[str, TensorRef], context: PassContext
) -> Artifact:
    """The artifact with the packed forms among its tensors, which carries them along wherever it is copied."""
    component = artifact.component
    files, tensors = dict(component.files), dict(component.tensors)
    if parts:
        pack = tensors[next(iter(record["weights"]))].file
        tensors |= {name: ref.model_copy(update={"file": pack}) for name, ref in parts.items()}
    data = json.dumps(record, indent=1, sort_keys=True).encode()
    files[COMPILED_FILE] = context.output.file(COMPILED_FILE, data)
    made = component.model_copy(update={"files": files, "tensors": dict(sorted(tensors.items()))})
    part = next(iter(artifact.manifest.components))
    return Artifact(artifact.manifest.model_copy(update={"components": {part: made}}), artifact.blobs)


class _Loaded(NamedTuple):
    load_s: float
    anonymous_bytes: int | None
    outputs: Outputs


def _entries(record: dict[str, Any], parts: dict[str, TensorRef]) -> dict[str, dict[str, str]]:
    """The packed forms as ONNX Runtime reads them: the opposite of `_take_packed`."""
    return {
        name: {entry: _entry(form, [parts[part] for part in form["parts"]]) for entry, form in forms.items()}
        for name, forms in record.items()
    }


def _entry(form: dict[str, Any], parts: list[TensorRef]) -> str:
    places = zip(parts, form["checksums"], strict=True)
    return "|".join([form["key"], *(f"{part.offset};{part.length};{checksum}" for part, checksum in places)])


def _compare(
    before: ir.Model, after: ir.Model, packed: dict[str, dict[str, str]], artifact: Artifact, context: PassContext
) -> None:
    """Load both, say what that took, and check that they compute the same.

    Raises: PipelineError where they do not.
    """
    interface = artifact.interface
    options = session_options(context.threads), session_options(context.threads, "all")
    if packed:
        context.output.pack_path()  # which flushes what was written to it
    new = _loaded(lambda: open_session(after, options[0], packed=packed), interface)
    old = _loaded(lambda: open_session(before, options[1]), interface)
    context.logger.info("loads in %.2f s, before in %.2f s", new.load_s, old.load_s)
    if new.anonymous_bytes is not None and old.anonymous_bytes is not None:
        megabytes = new.anonymous_bytes / 1e6, old.anonymous_bytes / 1e6
        context.logger.info("takes %.0f MB of memory beside the mapped files, before %.0f MB", *megabytes)
    if not new.outputs:
        return
    check_agreement(
        old.outputs,
        new.outputs,
        context,
        tolerance=TOLERANCE,
        what="the compiled graph",
        hint="this is a fault of ONNX Runtime; leave the pass out",
    )


def _loaded(opening: Callable[[], Any], interface: Interface) -> _Loaded:
    _give_back_freed_memory()
    memory, begin = _anonymous_bytes(), time.perf_counter()
    session = opening()
    load_s, after = time.perf_counter() - begin, _anonymous_bytes()
    outputs = outputs_of(session, interface)
    return _Loaded(load_s, None if memory is None or after is None else after - memory, outputs)


def _give_back_freed_memory() -> None:
    """What was freed before must not serve the next: its memory would look like less. Where the C library can."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def _anonymous_bytes() -> int | None:
    """Memory of this process that no file stands behind; None where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), None)
