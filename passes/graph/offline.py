"""ONNX Runtime's own graph optimizers, run once and saved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import HostError, PipelineError, check_external_tensors

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx_ir as ir

EXTERNAL_BYTES = 1024
"""Initializers above this size are saved outside the graph."""

GRAPH_FILE, DATA_FILE = "model.onnx", "model.onnx.data"


def optimize_offline(
    model: ir.Model,
    folder: Path,
    *,
    level: str,
    threads: int,
    config: Mapping[str, str] | None = None,
    providers: Iterable[str] = ("CPUExecutionProvider",),
) -> Path:
    """Save the graph as ONNX Runtime's optimizers leave it, into `folder`, and return the file's path.

    `level` is basic, extended or all. The weights are mapped where they lie; those that the saved graph has are in
    DATA_FILE beside it.

    Raises: PipelineError where ONNX Runtime refuses the graph.
    """
    path = folder / GRAPH_FILE
    options = session_options(threads, level)
    options.optimized_model_filepath = str(path)
    settings = {
        "session.optimized_model_external_initializers_file_name": DATA_FILE,
        "session.optimized_model_external_initializers_min_size_in_bytes": str(EXTERNAL_BYTES),
        **(config or {}),
    }
    for key, value in settings.items():
        options.add_session_config_entry(key, value)
    open_session(model, options, providers=providers)
    return path


def session_options(threads: int, level: str | None = None) -> Any:
    """Options of a session that is no longer needed after a few runs: little memory, and nothing on the screen.

    Without a `level` the graph runs as it stands; nothing is folded, and weights stay where they are mapped.
    """
    from onnxruntime import GraphOptimizationLevel, SessionOptions

    options = SessionOptions()
    options.graph_optimization_level = getattr(
        GraphOptimizationLevel, f"ORT_ENABLE_{level.upper()}" if level else "ORT_DISABLE_ALL"
    )
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = False  # it would keep what one step needed
    options.log_severity_level = 4  # what is wrong is in the exception
    return options


def open_session(
    model: ir.Model,
    options: Any,
    *,
    providers: Iterable[str] = ("CPUExecutionProvider",),
    packed: Mapping[str, Mapping[str, str]] | None = None,
) -> Any:
    """A session of the graph over its mapped weights, and over their packed forms.

    `packed` are further entries of weights' external data, by weight and key.

    Raises: PipelineError where ONNX Runtime refuses the graph, or it names files that are not its stored tensors';
    HostError where the first provider does not start.
    """
    import onnx_ir as ir
    import onnxruntime

    # files are mapped only if they lie below this folder: with the root, they may lie anywhere
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", Path.cwd().anchor)
    with _files_from_the_root(model) as stored:
        proto = ir.to_proto(model)
    for initializer in proto.graph.initializer:
        for key, value in (packed or {}).get(initializer.name, {}).items():
            initializer.external_data.add(key=key, value=value)
    data = proto.SerializeToString()
    check_external_tensors(data, stored)
    first, *others = providers
    if first == "CUDAExecutionProvider":
        onnxruntime.preload_dlls()  # pip installs CUDA and cuDNN where the dynamic linker does not look
    try:
        session = onnxruntime.InferenceSession(data, options, providers=[first, *others])
    except Exception as error:  # the runtime's exceptions share no base of their own
        raise PipelineError(f"ONNX Runtime refuses the graph: {str(error).partition(chr(10))[0]}") from error
    if first not in session.get_providers():  # it goes on with the others
        raise HostError(f"ONNX Runtime could not start {first}; are its libraries installed?")
    return session


def is_folded(value: ir.Value) -> bool:
    """Whether ONNX Runtime would compute something from this initializer alone: a cast or a transposed weight.

    It leaves DequantizeLinear, which stands for a smaller weight.
    """
    return any(
        node.op_type != "DequantizeLinear"
        and all(other is None or other.const_value is not None for other in node.inputs)
        for node in value.consumers()
    )


@contextmanager
def _files_from_the_root(model: ir.Model) -> Iterator[set[str]]:
    """Within, initializers that lie in files are named by the files' paths from the root. Gives their names."""
    import onnx_ir as ir

    stored: set[str] = set()
    with ExitStack() as restore:
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.LazyTensor):
                restore.callback(setattr, value, "const_value", tensor)
                value.const_value = _external(tensor)
                stored.add(str(value.name))
        yield stored


def _external(tensor: Any) -> ir.ExternalTensor:
    import onnx_ir as ir

    path, ref = tensor.path.resolve(), tensor.ref
    location = path.relative_to(path.anchor)
    return ir.ExternalTensor(location, ref.offset, ref.length, tensor.dtype, shape=tensor.shape, name=tensor.name)
