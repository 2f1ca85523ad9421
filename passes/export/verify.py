"""An exported graph against the torch model: the same random tokens, an empty and a filled cache, in float32.

A graph without a cache is given sequences of several lengths, each from its beginning. Of a model whose weights are
stored in half precision and would be large in float32, the embedding and the first layers are compared, by what they
put into their cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from passes.export.causal_lm import CausalLM, reference_causal_lm
from passes.graph.first_layers import keep_first_layers, widened_bytes
from pipeline import Artifact, Interface, PassContext, PipelineError, check_external_tensors

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

SEED = 0
BATCH = 2
CALLS = (7, 3, 1)
"""Tokens of each call: a prompt into an empty cache, a longer continuation, a single token."""

WIDENED_BYTES = 4 << 30
FIRST_LAYERS = 3
"""Each call widens the half-precision weights, in the graph and in torch. Where they would take more than WIDENED_BYTES
in float32, only what so many layers put into their cache is compared."""


def verify_against_torch(
    model: ir.Model, artifact: Artifact, interface: Interface, *, tolerance: float, context: PassContext
) -> dict[str, float]:
    """Run graph and torch model call by call, each continuing from its own cache, if any, and compare all outputs.

    The error of an output is its largest absolute difference over the standard deviation of torch's values.
    Returns the largest error of each call, by its shape. The log says what was compared.

    Raises: PipelineError where an error is above `tolerance` or not a number, or ONNX Runtime refuses the graph.
    """
    import numpy as np

    assert interface.vocab_size is not None
    tokens = np.random.default_rng(SEED).integers(0, interface.vocab_size, (BATCH, sum(CALLS)), dtype=np.int64)
    torch_model = reference_causal_lm(artifact)
    if interface.cache is not None and interface.cache.layers > FIRST_LAYERS and widened_bytes(model) > WIDENED_BYTES:
        layers = interface.cache.layers
        model = model.clone()
        interface = keep_first_layers(model, interface, FIRST_LAYERS)
        _drop_later_layers(torch_model, layers)
        context.logger.info(
            "the weights are large in float32: compared with torch are the embedding and, by what they put into their "
            "cache, the first %d of %d layers; not the later ones, nor the head",
            FIRST_LAYERS,
            layers,
        )
    graph, reference = _Graph(model, interface, context.threads), _Torch(torch_model, interface)
    errors: dict[str, float] = {}
    past = 0
    with _torch_threads(context.threads):
        for count in _calls(interface.max_length):
            chunk = tokens[:, past : past + count]
            shape = f"batch {BATCH}, {count} tokens, past {past}"
            got, expected = graph.step(chunk, past), reference.step(chunk, past)
            errors[shape] = _compare(got, expected, interface.outputs.get("logits"), shape, tolerance)
            context.logger.info("%s: largest error %.1e of the standard deviation", shape, errors[shape])
            past += count if interface.cache is not None else 0
    return errors


def _calls(max_length: int | None) -> Iterator[int]:
    """Token counts of the calls, cut so that all together fit the model."""
    room = max_length or sum(CALLS)
    for position, count in enumerate(CALLS):
        later = len(CALLS) - position - 1
        if room > 0:
            fitting = max(1, min(count, room - later))
            room -= fitting
            yield fitting


def _compare(
    got: dict[str, np.ndarray], expected: dict[str, np.ndarray], logits: str | None, shape: str, tolerance: float
) -> float:
    """The largest error of all outputs."""
    import numpy as np

    largest = 0.0
    for name, reference in expected.items():
        given = got[name]
        if name != logits:
            given = given[:, :, given.shape[2] - reference.shape[2] :]
        if given.shape != reference.shape:
            raise PipelineError(
                f"the exported graph differs from torch with {shape}: {name} has shape {list(given.shape)}, "
                f"torch gives {list(reference.shape)}"
            )
        if not np.isfinite(reference).all():
            raise PipelineError(
                f"the torch model itself gives values in {name} that are not finite: its weights are damaged, or "
                "float32 is too narrow for them"
            )
        difference = np.abs(given - reference)
        error = float(difference.max()) / (float(reference.std()) or 1.0)
        if not error <= tolerance:  # not a number, too
            where = np.unravel_index(int(np.argmax(difference)), difference.shape)
            index = ", ".join(str(int(i)) for i in where)
            raise PipelineError(
                f"the exported graph differs from torch with {shape}: {name}[{index}] is "
                f"{float(given[where]):.6g}, torch gives {float(reference[where]):.6g}; the difference is "
                f"{error:.2g} of the standard deviation, and {tolerance:.2g} is allowed",
                hint="raise `tolerance` only if this much is acceptable; an error near 1 is a wrong graph",
            )
        largest = max(largest, error)
    return largest


class _Graph:
    """The graph in ONNX Runtime and the cache it has filled."""

    def __init__(self, model: ir.Model, interface: Interface, threads: int) -> None:
        import numpy as np

        self._interface = interface
        self._session = _session(model, threads)
        self._past: dict[str, np.ndarray] = {}
        if (cache := interface.cache) is not None:
            empty = np.zeros((BATCH, cache.kv_heads, 0, cache.head_dim), np.float32)
            self._past = {name: empty for role, name in interface.inputs.items() if role.startswith("past.")}

    def step(self, tokens: np.ndarray, past: int) -> dict[str, np.ndarray]:
        """Outputs for tokens [B, S] after `past` others, by name."""
        inputs, outputs = self._interface.inputs, self._interface.outputs
        mask, positions = _mask_and_positions(tokens, past)
        given = {"tokens": tokens, "mask": mask, "positions": positions}
        feeds = {inputs[role]: array for role, array in given.items() if role in inputs} | self._past
        names = list(outputs.values())
        try:
            result = dict(zip(names, self._session.run(names, feeds), strict=True))
        except Exception as error:  # the runtime's exceptions share no base of their own
            raise PipelineError(
                f"ONNX Runtime cannot run the exported graph on {tokens.shape[1]} tokens after {past}: "
                f"{str(error).partition(chr(10))[0]}"
            ) from error
        self._past = {
            inputs[role.replace("present", "past")]: result[name]
            for role, name in outputs.items()
            if role.startswith("present.")
        }
        return result


class _Torch:
    """The torch model in float32 and the cache it has filled, of which sliding layers keep the last positions only."""

    def __init__(self, model: CausalLM, interface: Interface) -> None:
        from transformers import DynamicCache

        self._model = model
        self._interface = interface
        self._cache: Any = None
        if interface.cache is not None:
            self._cache = DynamicCache(config=self._model.module.config)  # as transformers itself would

    def step(self, tokens: np.ndarray, past: int) -> dict[str, np.ndarray]:
        """Outputs for tokens [B, S] after `past` others, by the graph's names."""
        import torch

        mask, positions = _mask_and_positions(tokens, past)
        extra = {"position_ids": torch.from_numpy(positions)} if self._model.takes_positions else {}
        names = self._interface.outputs
        module = self._model.module if "logits" in names else self._model.module.base_model  # without the head
        with torch.no_grad():
            result = module(
                input_ids=torch.from_numpy(tokens),
                attention_mask=torch.from_numpy(mask),
                past_key_values=self._cache,
                use_cache=self._cache is not None,
                **extra,
            )
        outputs = {names["logits"]: result.logits.numpy()} if "logits" in names else {}
        for i, layer in enumerate(self._cache.layers if self._cache is not None else ()):
            if f"present.k[{i}]" in names:
                outputs[names[f"present.k[{i}]"]] = layer.keys.numpy()
                outputs[names[f"present.v[{i}]"]] = layer.values.numpy()
        return outputs


def _drop_later_layers(model: CausalLM, layers: int) -> None:
    """Have the module end after its FIRST_LAYERS. What these put into the cache stays as it was."""
    from torch import nn

    for module in list(model.module.modules()):
        if isinstance(module, nn.ModuleList) and len(module) == layers:
            del module[FIRST_LAYERS:]
    model.module.config.get_text_config().num_hidden_layers = FIRST_LAYERS


def _mask_and_positions(tokens: np.ndarray, past: int) -> tuple[np.ndarray, np.ndarray]:
    """int64 [B, past + S] of ones, and int64 [B, S] counting from `past`."""
    import numpy as np

    batch, count = tokens.shape
    mask = np.ones((batch, past + count), np.int64)
    positions = np.broadcast_to(np.arange(past, past + count, dtype=np.int64), (batch, count))
    return mask, np.ascontiguousarray(positions)


def _session(model: ir.Model, threads: int) -> Any:
    """ONNX Runtime session of the graph over the mapped checkpoint.

    Nothing is folded or repacked: weights stay where they are mapped, and are cast or transposed one at a time.

    Raises: PipelineError where ONNX Runtime refuses the graph.
    """
    import onnx_ir as ir
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.enable_cpu_mem_arena = False  # it would keep what the casts needed
    options.log_severity_level = 4  # what is wrong is in the exception
    options.add_session_config_entry("session.disable_prepacking", "1")
    # files are mapped only if they lie below this folder: with the root, they may lie anywhere
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", Path.cwd().anchor)
    stored = {v: v.const_value for v in model.graph.initializers.values() if isinstance(v.const_value, ir.LazyTensor)}
    try:
        for value, tensor in stored.items():
            value.const_value = _external(tensor)
        data = ir.to_proto(model).SerializeToString()
    finally:
        for value, tensor in stored.items():
            value.const_value = tensor
    check_external_tensors(data, {str(value.name) for value in stored})
    try:
        return onnxruntime.InferenceSession(
            data, options, providers=["CPUExecutionProvider"], disabled_optimizers=["ConstantFolding"]
        )
    except Exception as error:  # the runtime's exceptions share no base of their own
        raise PipelineError(f"ONNX Runtime refuses the exported graph: {str(error).partition(chr(10))[0]}") from error


def _external(tensor: Any) -> ir.ExternalTensor:
    """The stored tensor by its file's path from the root."""
    import onnx_ir as ir

    path, ref = tensor.path.absolute(), tensor.ref
    location = path.relative_to(path.anchor)
    return ir.ExternalTensor(location, ref.offset, ref.length, tensor.dtype, shape=tensor.shape, name=tensor.name)


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
