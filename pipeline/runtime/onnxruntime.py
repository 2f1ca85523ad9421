"""Runs an ONNX graph of a causal language model with ONNX Runtime.

Weights are mapped where they lie: ONNX Runtime is given the graph with their files' paths. A graph that was compiled
(its component has `compiled.json`) runs as it stands, with packed weights mapped as well, on the CPU that it was
compiled for; on another, ONNX Runtime packs the plain weights that the graph has, too.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pipeline.artifact import ONNX_FILE, Artifact, numpy_dtype
from pipeline.errors import HostError, PipelineError
from pipeline.hardware.host import describe_host
from pipeline.onnx_wire import check_external_tensors
from pipeline.runtime.protocol import ExecutionSpec
from pipeline.runtime.sequence import NO_CACHE, NO_CACHE_HINT, Sequence, as_tokens

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike

    from pipeline.runtime.layer_outputs import LayerOutputs

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"

COMPILED_FILE = "compiled.json"
"""What a compiled graph was compiled for, and its packed weights by name: see passes/compile/compile_onnxruntime.py."""

logger = logging.getLogger("pipeline.runtime")


def _installed() -> str:
    for name in ("onnxruntime", "onnxruntime-gpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "unknown"


class OnnxRuntimeRunner:
    """One session over mapped weights; what a step presents is the next step's past, never copied by us.

    A graph without a cache is run whole: `forward` and `score` do, `prefill` and `decode` refuse. The interface names
    the tensors by role: inputs `tokens` and, where the graph has them, `mask` [B, past + S] and `positions` [B, S];
    `past.k[i]` and `past.v[i]` [B, kv_heads, T, head_dim]; outputs `logits` [B, S, V], `present.k[i]` and
    `present.v[i]`. All integers are int64 unless the graph says int32.

    Raises: PipelineError where the graph does not load or its interface is incomplete; HostError where the execution
    provider is not there.
    """

    version: ClassVar[str] = f"2 onnxruntime {_installed()}"

    def __init__(self, artifact: Artifact, spec: ExecutionSpec) -> None:
        # importing ONNX Runtime starts a thread that sends usage data, unless this is set or it is imported already
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
        import onnxruntime as ort

        provider = _provider(spec)
        available = ort.get_available_providers()
        if provider not in available:
            raise HostError(
                f"the stage asks for {provider}; this ONNX Runtime has {', '.join(available)}",
                hint="install the ONNX Runtime package that has it, or choose another profile",
            )
        interface = artifact.interface
        if "tokens" not in interface.inputs or "logits" not in interface.outputs:
            raise PipelineError("the graph's interface names no input `tokens` or no output `logits`")
        cached = any(role.startswith(("past.", "present.")) for role in (*interface.inputs, *interface.outputs))
        if interface.max_length is None or (cached and interface.cache is None):
            raise PipelineError("the graph's interface has no cache layout or no max_length")
        self._inputs = interface.inputs
        self._logits = interface.outputs["logits"]
        self._layout = interface.cache
        self._logits_to_keep = interface.logits_to_keep
        self.has_cache = interface.cache is not None
        layers = range(interface.cache.layers if interface.cache else 0)
        try:
            self._pasts = [interface.inputs[f"past.{part}[{i}]"] for i in layers for part in "kv"]
            self._presents = [interface.outputs[f"present.{part}[{i}]"] for i in layers for part in "kv"]
        except KeyError as missing:
            raise PipelineError(f"the graph's interface has no tensor for the role {missing}") from None

        self._session = _open_session(artifact, spec, provider)
        self._types = {node.name: (node.type, node.shape) for node in self._session.get_inputs()}
        unknown = set(self._types) - set(self._inputs.values()) - {self._logits_to_keep}
        if unknown:
            raise PipelineError(f"the interface gives no role to the graph's inputs {', '.join(sorted(unknown))}")
        self._device = "cuda" if provider == CUDA else "cpu"
        self.max_length = interface.max_length
        self.vocab_size = interface.vocab_size or self._vocabulary()
        self._sequence = Sequence(self.max_length)
        self._past: list[Any] = []

    @staticmethod
    def import_libraries(artifact: Artifact) -> None:
        """Import all that loading needs, so that a load time does not count it."""
        import ml_dtypes  # noqa: F401
        import onnx  # noqa: F401
        import onnx_ir  # noqa: F401
        import onnxruntime  # noqa: F401

    @staticmethod
    def layers(artifact: Artifact, spec: ExecutionSpec, *, fed: bool = False) -> LayerOutputs:
        """The artifact, loaded so that it shows what lies between its layers, or is fed there.

        Raises: PipelineError where no layers are found in its graph, or it does not load.
        """
        from pipeline.runtime.onnx_layers import OnnxLayers

        return OnnxLayers(artifact, spec, fed=fed)

    def values(
        self, tokens: ArrayLike, names: Iterable[str], given: Mapping[str, np.ndarray] | None = None
    ) -> list[np.ndarray]:
        """These outputs of the graph as float32, after a pass over [B, S] from an empty cache, which keeps nothing.

        `given` are inputs of the graph that the interface does not name.
        """
        ids = as_tokens(tokens)
        _, length = self._sequence.check_prompt(ids)
        self.reset()
        feeds = self._feeds(ids, keep=length) | {name: _ort_value(array) for name, array in (given or {}).items()}
        try:
            found = self._session.run_with_ort_values(list(names), feeds)
        except Exception as error:  # ONNX Runtime raises its own exceptions, which share no base
            raise PipelineError(f"ONNX Runtime failed on tokens {list(ids.shape)}: {error}") from error
        return [_positions(value, slice(None)) for value in found]

    def forward(self, tokens: ArrayLike) -> np.ndarray:
        """Compute the logits of all positions of [B, S], keep nothing, and return the last position's, [B, V]."""
        ids = as_tokens(tokens)
        _, length = self._sequence.check_prompt(ids)
        self.reset()
        return _positions(self._run(ids, keep=length, cached=False), slice(-1, None))[:, -1]

    def prefill(self, tokens: ArrayLike) -> np.ndarray:
        """Empty the cache, process a prompt [B, S], and return the last position's logits [B, V].

        Raises: PipelineError where the graph has no cache.
        """
        self._require_cache()
        ids = as_tokens(tokens)
        batch, length = self._sequence.check_prompt(ids)
        self.reset()
        logits = self._run(ids, keep=1)
        self._sequence.extend(batch, length)
        return _positions(logits, slice(-1, None))[:, -1]

    def decode(self, tokens: ArrayLike) -> np.ndarray:
        """Append one token a sequence, [B, 1], and return its logits [B, V].

        Raises: PipelineError where the graph has no cache.
        """
        self._require_cache()
        ids = as_tokens(tokens)
        batch = self._sequence.check_step(ids)
        logits = self._run(ids, keep=1)
        self._sequence.extend(batch, 1)
        return _positions(logits, slice(-1, None))[:, -1]

    def score(self, tokens: ArrayLike) -> Iterator[np.ndarray]:
        """Logits of all positions of [B, S] from an empty cache, in order, in chunks [B, C, V].

        With B > 1 the positions run at once: GroupQueryAttention refuses several sequences of several tokens each
        after a past. Without a cache they do, too, and their logits are converted chunk by chunk.
        """
        ids = as_tokens(tokens)
        batch, length = self._sequence.check_prompt(ids)
        self.reset()
        step = self._sequence.chunk_length(batch, self.vocab_size)
        if not self.has_cache:
            logits = self._run(ids, keep=length)
            for begin in range(0, length, step):
                yield _positions(logits, slice(begin, begin + step))
            return
        step = step if batch == 1 else length
        for begin in range(0, length, step):
            part = ids[:, begin : begin + step]
            logits = self._run(part, keep=part.shape[1])
            self._sequence.extend(batch, part.shape[1])
            yield _positions(logits, slice(-part.shape[1], None))
        self.reset()

    def reset(self) -> None:
        """Empty the cache."""
        self._past = []
        self._sequence.reset()

    def _require_cache(self) -> None:
        if not self.has_cache:
            raise PipelineError(NO_CACHE, hint=NO_CACHE_HINT)

    def _run(self, tokens: np.ndarray, *, keep: int, cached: bool = True) -> Any:
        """An OrtValue: the logits of these tokens after what the cache holds, at least of the last `keep`.

        What the tokens add to the cache is kept if `cached`.
        """
        values = self._feeds(tokens, keep=keep)
        binding = self._session.io_binding()
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        binding.bind_output(self._logits, "cpu")
        for name in self._presents if cached else ():
            binding.bind_output(name, self._device)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # ONNX Runtime raises its own exceptions, which share no base
            shape, past = list(tokens.shape), self._sequence.length
            self.reset()
            raise PipelineError(f"ONNX Runtime failed on tokens {shape} after {past}: {error}") from error
        logits, *self._past = binding.get_outputs()  # in the order of binding
        return logits

    def _feeds(self, tokens: np.ndarray, *, keep: int) -> dict[str, Any]:
        """OrtValues of the graph's inputs for these tokens after what the cache holds."""
        import numpy as np

        batch, length = tokens.shape
        past = self._sequence.length
        given = {self._inputs["tokens"]: tokens}
        if (mask := self._inputs.get("mask")) is not None:
            given[mask] = np.ones((batch, past + length))
        if (positions := self._inputs.get("positions")) is not None:
            given[positions] = np.broadcast_to(np.arange(past, past + length), (batch, length))
        if self._logits_to_keep is not None:
            given[self._logits_to_keep] = np.full([1] * len(self._types[self._logits_to_keep][1]), keep)
        values = {name: _ort_value(self._integers(name, array)) for name, array in given.items()}
        if self._pasts:
            values |= zip(self._pasts, self._past or self._empty_past(batch), strict=True)
        return values

    def _integers(self, name: str, values: np.ndarray) -> np.ndarray:
        """`values` in the integer type that the graph's input has."""
        import numpy as np

        return np.ascontiguousarray(values, dtype=np.int32 if self._types[name][0] == "tensor(int32)" else np.int64)

    def _empty_past(self, batch: int) -> list[Any]:
        import numpy as np

        layout = self._layout
        assert layout is not None
        empty = _ort_value(np.empty((batch, layout.kv_heads, 0, layout.head_dim), numpy_dtype(layout.dtype)))
        return [empty] * len(self._pasts)

    def _vocabulary(self) -> int:
        shape = next(node.shape for node in self._session.get_outputs() if node.name == self._logits)
        if not isinstance(shape[-1], int):
            raise PipelineError("neither the graph nor its interface says how large the vocabulary is")
        return shape[-1]


def _provider(spec: ExecutionSpec) -> str:
    """The execution provider: the one asked for, or for a CUDA device, CUDA's."""
    return CUDA if spec.device == "cuda" and spec.provider == CPU else spec.provider


def _open_session(artifact: Artifact, spec: ExecutionSpec, provider: str) -> Any:
    import onnxruntime as ort

    if ONNX_FILE not in artifact.component.files:
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
    compiled = _compiled_for_this_host(artifact, provider)
    if compiled is not None:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    graph = _graph_over_files(artifact, compiled or {})
    providers = [provider] if provider == CPU else [provider, CPU]
    try:
        return ort.InferenceSession(graph, options, providers=providers)
    except Exception as error:  # ONNX Runtime raises its own exceptions, which share no base
        raise PipelineError(f"ONNX Runtime cannot load the graph: {error}") from error


def _compiled_for_this_host(artifact: Artifact, provider: str) -> dict[str, Any] | None:
    """The packed forms of weights, by weight and entry; None where the graph is not compiled, or not for this host.

    Raises: HostError where the graph has operators that only the CPU that it was compiled for can run.
    """
    entry = artifact.component.files.get(COMPILED_FILE)
    if entry is None:
        return None
    record = json.loads(artifact.locate(entry).read_text(encoding="utf-8"))
    facets = describe_host().facets()
    here = {
        "cpu": facets["host.cpu"],
        "instruction_sets": facets["host.instruction_sets"],
        "onnxruntime": _installed(),
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


def _graph_over_files(artifact: Artifact, packed: dict[str, Any]) -> bytes:
    """The graph, its external initializers named by the paths from the root of the files that hold them.

    Raises: PipelineError where it is no graph, or keeps a tensor outside that the manifest does not know.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    component = artifact.component
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


def _ort_value(array: np.ndarray) -> Any:
    """An OrtValue over the array's own memory."""
    import onnxruntime as ort

    if array.dtype.type.__module__ == "ml_dtypes":
        import onnx_ir

        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, int(onnx_ir.DataType.from_numpy(array.dtype)))
    return ort.OrtValue.ortvalue_from_numpy(array)


def _positions(logits: Any, part: slice) -> np.ndarray:
    """These positions of an OrtValue [B, S, V] on the host, copied as float32; the others are not copied."""
    import ctypes

    import numpy as np
    import onnx_ir

    dtype = onnx_ir.DataType(logits.element_type()).numpy()
    memory = (ctypes.c_char * logits.tensor_size_in_bytes()).from_address(logits.data_ptr())
    view = np.frombuffer(memory, dtype).reshape(logits.shape())
    return view[:, part].astype(np.float32)
