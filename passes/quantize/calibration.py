"""What flows through a graph when it reads the calibration text: inner values, a few at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from passes.graph.causal_lm_session import CausalLMSession
from pipeline import Artifact, PassContext, PipelineError, load_onnx

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

RUN_TOKENS = 1024
"""Tokens of one run of the graph, in as many sequences as that makes."""

DECODE_STEPS = 4
"""Single tokens that follow each prompt where a cache is asked for."""


def calibration_tokens(artifact: Artifact, context: PassContext, *, samples: int, length: int) -> np.ndarray:
    """int64 [samples, length]: pieces of the calibration text, chosen by the seed, that do not overlap.

    There are fewer where the text is shorter, and they are shorter where the model is.

    Raises: PipelineError where the artifact has no tokenizer.json or another model's, or the text is too short.
    """
    import numpy as np
    from tokenizers import Tokenizer

    path = artifact.file("tokenizer.json")
    if path is None:
        raise PipelineError(
            "calibration reads text, and the model has no tokenizer.json",
            hint="put the model's tokenizer.json beside it, or choose a method that needs no calibration",
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises Exception itself
        raise PipelineError(f"the model's tokenizer.json cannot be read: {error}") from error
    limit = artifact.interface.max_length
    if limit is not None and limit < length:
        context.logger.info("the model takes %d tokens at most: samples have %d, not %d", limit, limit, length)
        length = limit
    ids = np.array(tokenizer.encode(context.calibration_text, add_special_tokens=False).ids, np.int64)
    vocabulary = artifact.interface.vocab_size
    if vocabulary is not None and ids.size and ids.max() >= vocabulary:
        raise PipelineError(
            f"the tokenizer gives token {ids.max()} and the model's vocabulary has {vocabulary}",
            hint="the tokenizer.json beside the model is another model's",
        )
    pieces = len(ids) // length
    if not pieces:
        raise PipelineError(f"the calibration text gives {len(ids)} tokens, less than one sample of {length}")
    if pieces < samples:
        context.logger.info("the calibration text gives %d samples of %d tokens, not %d", pieces, length, samples)
    chosen = np.random.default_rng(context.seed).permutation(pieces)[:samples]
    return np.stack([ids[start * length :][:length] for start in np.sort(chosen)])


def observe(
    artifact: Artifact, names: Sequence[str], tokens: np.ndarray, *, threads: int, decode: bool
) -> Iterator[dict[str, np.ndarray]]:
    """Run the graph over tokens [samples, length] and yield the values of those names, run by run.

    What the names do not need is not computed. With `decode`, each run of prompts is followed by runs of single tokens
    after the cache that it left, the last of the samples' tokens.

    Raises: PipelineError where the graph takes inputs that tokens alone do not give, or ONNX Runtime refuses it.
    """
    graph = _open(artifact, names, threads=threads, decode=decode)
    length = tokens.shape[1]
    steps = min(DECODE_STEPS, length - 1) if graph.has_cache else 0
    batch = max(1, RUN_TOKENS // length)
    for begin in range(0, len(tokens), batch):
        part = tokens[begin : begin + batch]
        yield graph.run(part[:, : length - steps], past=0, keep=1)
        for place in range(length - steps, length):
            yield graph.run(part[:, place : place + 1], past=place, keep=1)


def _open(artifact: Artifact, names: Sequence[str], *, threads: int, decode: bool) -> CausalLMSession:
    """The graph with the values of those names for outputs and, with `decode`, its cache."""
    interface = artifact.interface
    if "tokens" not in interface.inputs:
        raise PipelineError("calibration reads text, and the graph's interface names no input `tokens`")
    presents = [name for role, name in interface.outputs.items() if role.startswith("present.")] if decode else []
    model = load_onnx(artifact)
    _keep_outputs(model, [*names, *presents])
    session, weights = _session(model, threads)
    return CausalLMSession(session, interface, names, carried=decode, alive=weights)


def _keep_outputs(model: ir.Model, names: Sequence[str]) -> None:
    """Make the values of those names the graph's outputs, and drop what they do not need."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    graph = model.graph
    found = {str(value.name): value for node in graph for value in node.outputs}
    found |= {str(value.name): value for value in graph.inputs}
    del graph.outputs[:]
    graph.outputs.extend(found[name] for name in dict.fromkeys(names))
    RemoveUnusedNodesPass()(model)


def _session(model: ir.Model, threads: int) -> tuple[Any, list[Any]]:
    """(session, values that own its mapped weights).

    Nothing is folded or repacked: weights stay where they are mapped, and are cast or transposed one at a time.

    Raises: PipelineError where ONNX Runtime refuses the graph.
    """
    import onnx_ir as ir
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.enable_cpu_mem_arena = False  # it would keep what the casts needed
    options.log_severity_level = 4  # what is wrong is in the exception
    if all(node.op_type != "MatMulNBits" for node in model.graph.all_nodes()):  # far slower without
        options.add_session_config_entry("session.disable_prepacking", "1")
    names, weights = [], []
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if not isinstance(tensor, ir.LazyTensor):
            continue
        names.append(name)
        weights.append(
            onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(tensor.numpy(), int(tensor.dtype))
            if tensor.dtype == ir.DataType.BFLOAT16
            else onnxruntime.OrtValue.ortvalue_from_numpy(tensor.numpy())
        )
        value.const_value = ir.ExternalTensor("weights", 0, tensor.nbytes, tensor.dtype, shape=tensor.shape, name=name)
    if weights:
        options.add_external_initializers(names, weights)
    try:
        return onnxruntime.InferenceSession(
            ir.to_proto(model).SerializeToString(),
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=["ConstantFolding"],
        ), weights
    except Exception as error:  # the runtime's exceptions share no base of their own
        raise PipelineError(f"ONNX Runtime cannot load the graph: {str(error).partition(chr(10))[0]}") from error
