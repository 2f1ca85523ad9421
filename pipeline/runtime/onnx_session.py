"""Opens an ONNX component in ONNX Runtime.

Weights are mapped where they lie: ONNX Runtime is given the graph with their files' paths. A graph that was compiled
(its component has `compiled.json`) runs as it stands, with packed weights mapped as well, on the CPU that it was
compiled for; on another, ONNX Runtime packs the plain weights that the graph has, too.
"""

from __future__ import annotations

import json
import logging
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.artifact import ONNX_FILE, Artifact, Component
from pipeline.errors import HostError, PipelineError
from pipeline.hardware.host import describe_host
from pipeline.onnx_wire import check_external_tensors
from pipeline.runtime.protocol import ExecutionSpec

if TYPE_CHECKING:
    import numpy as np

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"

COMPILED_FILE = "compiled.json"
"""What a compiled graph was compiled for, and its packed weights by name: see passes/compile/compile_onnxruntime.py."""

logger = logging.getLogger("pipeline.runtime")


def installed_version() -> str:
    """The version of ONNX Runtime, whichever of its packages is installed; nothing is imported."""
    for name in ("onnxruntime", "onnxruntime-gpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "unknown"


def provider_of(spec: ExecutionSpec) -> str:
    """The execution provider: the one asked for, or for a CUDA device, CUDA's."""
    return CUDA if spec.device == "cuda" and spec.provider == CPU else spec.provider


def require_provider(provider: str) -> None:
    """Have what the execution provider needs at hand.

    Raises: HostError where this ONNX Runtime does not have it.
    """
    import onnxruntime as ort

    available = ort.get_available_providers()
    if provider not in available:
        raise HostError(
            f"the stage asks for {provider}; this ONNX Runtime has {', '.join(available)}",
            hint="install the ONNX Runtime package that has it, or choose another profile",
        )
    if provider == CUDA:
        ort.preload_dlls()  # pip installs CUDA and cuDNN where the dynamic linker does not look


def open_session(artifact: Artifact, component: Component, spec: ExecutionSpec, provider: str) -> Any:
    """An InferenceSession of one of the artifact's components.

    Raises: PipelineError where the graph does not load; HostError where the provider does not start, or the graph was
    compiled for another host and cannot run on this one.
    """
    import onnxruntime as ort

    if ONNX_FILE not in component.files:
        raise PipelineError(f"the artifact has no {ONNX_FILE}")
    options = ort.SessionOptions()
    options.intra_op_num_threads = spec.threads
    options.inter_op_num_threads = 1
    # an idle session must not take cores from another that runs
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # files are mapped only if they lie below this folder: with the root, they may lie anywhere
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", Path.cwd().anchor)
    for key, value in spec.options.items():
        options.add_session_config_entry(key, str(value))
    compiled = compiled_for_this_host(artifact, component, provider)
    if compiled is not None:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    graph = graph_over_files(artifact, component, compiled or {})
    providers = [provider] if provider == CPU else [provider, CPU]
    try:
        session = ort.InferenceSession(graph, options, providers=providers)
    except Exception as error:  # ONNX Runtime raises its own exceptions, which share no base
        raise PipelineError(f"ONNX Runtime cannot load the graph: {error}") from error
    if provider not in session.get_providers():  # it says so in the log, and goes on without
        raise HostError(
            f"ONNX Runtime could not start {provider}, and would run the graph on the processor instead",
            hint="the log says what is missing; `pip install onnxruntime-gpu[cuda,cudnn]` brings the libraries of CUDA",
        )
    return session


def compiled_for_this_host(artifact: Artifact, component: Component, provider: str) -> dict[str, Any] | None:
    """The packed forms of weights, by weight and entry; None where the graph is not compiled, or not for this host.

    Raises: HostError where the graph has operators that only the CPU that it was compiled for can run.
    """
    entry = component.files.get(COMPILED_FILE)
    if entry is None:
        return None
    record = json.loads(artifact.locate(entry).read_text(encoding="utf-8"))
    facets = describe_host().facets()
    here = {
        "cpu": facets["host.cpu"],
        "instruction_sets": facets["host.instruction_sets"],
        "onnxruntime": installed_version(),
    }
    different = [f"{key} {record[key]} there, {value} here" for key, value in here.items() if record[key] != value]
    if provider != CPU:
        different.append(f"{CPU} there, {provider} here")
    if not different:
        weights: dict[str, Any] = record["weights"]
        return weights
    reason = "; ".join(different)
    if record["layout"]:
        raise HostError(
            f"the graph was compiled for another host: {reason}",
            hint="run the recipe here, so that it is compiled for this one",
        )
    logger.warning("the model was compiled for another host, and loads as if it were not compiled: %s", reason)
    return None


def graph_over_files(artifact: Artifact, component: Component, packed: dict[str, Any]) -> bytes:
    """The graph, its external initializers named by the paths from the root of the files that hold them.

    Raises: PipelineError where it is no graph, or keeps a tensor outside that the manifest does not know.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        model = onnx.load(artifact.locate(component.files[ONNX_FILE]), load_external_data=False)
    except DecodeError as error:
        raise PipelineError(f"ONNX Runtime cannot load the graph: {ONNX_FILE} is damaged: {error}") from error
    paths = {name: artifact.locate(entry).resolve() for name, entry in component.files.items()}
    for initializer in model.graph.initializer:
        if initializer.data_location != onnx.TensorProto.EXTERNAL:
            continue
        name = initializer.name
        if name not in component.tensors:
            raise PipelineError(f"{ONNX_FILE} keeps initializer {name!r} outside, and the manifest does not say where")
        ref = component.tensors[name]
        path = paths[ref.file]
        entries = {
            "location": str(path.relative_to(path.anchor)),
            "offset": str(ref.offset),
            "length": str(ref.length),
        }
        for entry, form in packed.get(name, {}).items():
            parts = [component.tensors[part] for part in form["parts"]]
            if all(part.file == ref.file for part in parts):  # ONNX Runtime takes them from the weight's own file
                places = zip(parts, form["checksums"], strict=True)
                entries[entry] = "|".join([form["key"], *(f"{p.offset};{p.length};{c}" for p, c in places)])
        del initializer.external_data[:]
        for key, value in entries.items():
            initializer.external_data.add(key=key, value=value)
    data: bytes = model.SerializeToString()
    check_external_tensors(data, component.tensors)
    return data


class OnnxSession:
    """A session, and what stays bound to its inputs and outputs from one step to the next.

    `types` has the data type and the shape of each input by name. `device` is where its cache lies: cpu or cuda.
    """

    def __init__(self, session: Any, *, logits: str, pasts: list[str], presents: list[str], device: str) -> None:
        self._session = session
        self._logits, self._pasts, self._presents = logits, pasts, presents
        self._device = device
        self.types = {node.name: (node.type, node.shape) for node in session.get_inputs()}
        self._binding: Any = None
        self._bound: dict[str, Any] = {}  # input -> the OrtValue that is bound to it
        self._logits_shape: tuple[int, ...] = ()  # what the logits that are bound depend on

    @property
    def vocabulary(self) -> int:
        """The size of the last dimension of the logits.

        Raises: PipelineError where the graph does not say it.
        """
        shape = next(node.shape for node in self._session.get_outputs() if node.name == self._logits)
        if not isinstance(shape[-1], int):
            raise PipelineError("neither the graph nor its interface says how large the vocabulary is")
        return shape[-1]

    def integers(self, name: str, values: np.ndarray) -> np.ndarray:
        """`values` in the integer type that the graph's input has."""
        import numpy as np

        return np.ascontiguousarray(values, dtype=np.int32 if self.types[name][0] == "tensor(int32)" else np.int64)

    def values(self, names: list[str], inputs: dict[str, Any]) -> list[Any]:
        """These outputs as OrtValues."""
        found: list[Any] = self._session.run_with_ort_values(names, inputs)
        return found

    def run(self, inputs: dict[str, Any], past: list[Any], *, keeps: bool) -> tuple[Any, list[Any]]:
        """The logits and, if it `keeps` them, what each layer presents: its key and value with those of the past."""
        binding = self._session.io_binding()
        for name, value in (*inputs.items(), *zip(self._pasts, past, strict=True)):
            binding.bind_ortvalue_input(name, value)
        binding.bind_output(self._logits, "cpu")
        for name in self._presents if keeps else ():
            binding.bind_output(name, self._device)
        self._session.run_with_iobinding(binding)
        binding.clear_binding_inputs()  # what it gives holds on to the binding, and must not hold on to the past
        logits, *presents = binding.get_outputs()  # in the order of binding
        return logits, presents

    def run_in_place(self, inputs: dict[str, Any], cache: list[Any], logits_shape: tuple[int, ...]) -> Any:
        """The logits, after what the tokens add was written into the buffers of the cache, which are past and present.

        Only what is another OrtValue than in the step before is bound anew: of a cache on the host nothing, until
        `unbind`; of one on a device the past.
        `logits_shape` is what the shape of the logits depends on: while it stays, they are written where those of the
        step before are. They have to be copied before the next step.
        """
        import onnxruntime as ort

        if self._binding is None:
            self._binding = self._session.io_binding()
            for past, present, value in zip(self._pasts, self._presents, cache, strict=True):
                self._binding.bind_ortvalue_input(past, value)
                self._binding.bind_ortvalue_output(present, value)
        elif self._device != "cpu":
            # Where a node that has no kernel there takes the past, as float32 GroupQueryAttention on CUDA, binding
            # copies it to the host: what is bound is the cache as it was then. On the device, binding copies nothing.
            for past, value in zip(self._pasts, cache, strict=True):
                self._binding.bind_ortvalue_input(past, value)
        for name, value in inputs.items():
            if self._bound.get(name) is not value:
                self._binding.bind_ortvalue_input(name, value)
                self._bound[name] = value
        if self._logits_shape != logits_shape:
            self._binding.bind_output(self._logits, "cpu")
            self._logits_shape = logits_shape
        self._session.run_with_iobinding(self._binding)
        return ort.OrtValue(self._binding.get_outputs_as_ortvaluevector()[len(self._presents)])

    def unbind(self) -> None:
        """Let go of all that is bound, as when the cache lies elsewhere or a step failed."""
        self._binding, self._bound, self._logits_shape = None, {}, ()


def ort_value(array: np.ndarray) -> Any:
    """An OrtValue over the array's own memory."""
    import onnxruntime as ort

    if array.dtype.type.__module__ == "ml_dtypes":
        from onnx import helper

        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, int(helper.np_dtype_to_tensor_dtype(array.dtype)))
    return ort.OrtValue.ortvalue_from_numpy(array)
