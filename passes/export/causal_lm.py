"""A causal language model of `transformers` without its weights in memory.

The configuration gives the architecture, the checkpoint gives the place of every tensor. For tracing, parameters have
shapes and no bytes; for a reference run, they are mapped from the checkpoint and computed with in float32, one module
at a time.
"""

from __future__ import annotations

import re
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline import Artifact, PipelineError, checkpoint_folder

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode


OPERATOR = re.compile(
    r"target=torch\.ops\.(?P<target>[\w.]+)|OpOverload\(op='(?P<op>[\w.]+)', overload='(?P<overload>\w+)'\)"
)
"""How torch's exporter writes the operator that it could not translate."""


@dataclass(frozen=True)
class CausalLM:
    """A model and, for each of its parameters and stored buffers, the name of the checkpoint's tensor."""

    module: torch.nn.Module
    sources: Mapping[str, str]

    @property
    def takes_positions(self) -> bool:
        """True where the model takes `position_ids`; models with ALiBi do not."""
        import inspect

        return "position_ids" in inspect.signature(type(self.module).forward).parameters


def causal_lm_config(artifact: Artifact) -> Any:
    """The `transformers` configuration of a torch artifact.

    Raises: PipelineError where there is none, its type is unknown or no causal language model, or it is quantized.
    """
    if artifact.manifest.execution.get("trust_remote_code"):
        config = _remote_config(artifact)
    else:
        config = _known_config(artifact.read_json("config.json"))
    if getattr(config, "quantization_config", None):
        raise PipelineError(
            "the checkpoint is already quantized; only float32, float16 and bfloat16 checkpoints can be exported",
            hint="start from the original model and quantize it with a pass",
        )
    return config


def _known_config(data: dict[str, Any]) -> Any:
    """The configuration of an architecture that transformers knows."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    kind = data.get("model_type")
    if kind is None:
        raise PipelineError("the model has no config.json with a model_type, so its architecture is unknown")
    if kind not in CONFIG_MAPPING:
        raise PipelineError(
            f"transformers has no architecture {kind!r}",
            hint="it brings its own code; `trust_remote_code: true` under `model:` runs it"
            if "auto_map" in data
            else None,
        )
    config = CONFIG_MAPPING[kind].from_dict(data)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise PipelineError(
            f"{kind!r} is not a causal language model: transformers has no AutoModelForCausalLM for it",
            hint="export_onnx exports decoder-only language models",
        )
    return config


def _remote_config(artifact: Artifact) -> Any:
    """The configuration of a model that may bring its own code."""
    from transformers import AutoConfig

    with checkpoint_folder(artifact) as folder:
        try:
            return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=True)
        except Exception as error:  # the model's own code
            raise PipelineError(f"the model's configuration cannot be read: {first_cause(error)}") from error


def _model_class(artifact: Artifact, config: Any) -> Any:
    """The class of the causal language model, the model's own where it brings one that the recipe trusts."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    own = (getattr(config, "auto_map", None) or {}).get("AutoModelForCausalLM")
    if own is not None and artifact.manifest.execution.get("trust_remote_code"):
        with checkpoint_folder(artifact) as folder:
            return get_class_from_dynamic_module(own, str(folder), local_files_only=True)
    found = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return found[0] if isinstance(found, tuple | list) else found


def traced_causal_lm(artifact: Artifact, mode: FakeTensorMode) -> CausalLM:
    """The model with parameters that have shapes and no bytes, fakes of `mode`; computed buffers (rotary frequencies
    …) have their values. Parameters that share a tensor are separate fakes with the same source.

    Raises: PipelineError as `causal_lm_config` does, and where the checkpoint lacks a parameter.
    """
    import torch

    def fake(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
        with mode:
            return torch.nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype), requires_grad=False)

    return _build(artifact, fake)


def reference_causal_lm(artifact: Artifact) -> CausalLM:
    """The model with the checkpoint's weights, mapped; those that are not float32 become so while they are used."""
    import torch

    def on_meta(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
        return torch.nn.Parameter(torch.empty(parameter.shape, device="meta"), requires_grad=False)

    model = _build(artifact, on_meta)
    for path, module in model.module.named_modules():
        prefix = f"{path}." if path else ""
        for name in list(module._parameters):
            if source := model.sources.get(prefix + name):
                tensor = torch_view(artifact.tensor(source))
                module._parameters[name] = torch.nn.Parameter(tensor, requires_grad=False)
        for name in list(module._buffers):
            if source := model.sources.get(prefix + name):
                module._buffers[name] = torch_view(artifact.tensor(source))
        _compute_in_float32(module)
    return model


def checkpoint_causal_lm(artifact: Artifact, held: Callable[[np.ndarray, int], torch.Tensor]) -> CausalLM:
    """The model with `held(tensor of the checkpoint, its number)`, a float32 tensor, for every parameter."""
    import torch

    def on_meta(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
        return torch.nn.Parameter(torch.empty(parameter.shape, device="meta"), requires_grad=False)

    model = _build(artifact, on_meta)
    numbers = {source: number for number, source in enumerate(sorted(set(model.sources.values())))}
    for path, module in model.module.named_modules():
        prefix = f"{path}." if path else ""
        for name in [*module._parameters, *module._buffers]:
            if source := model.sources.get(prefix + name):
                tensor = held(artifact.tensor(source), numbers[source])
                if name in module._parameters:
                    module._parameters[name] = torch.nn.Parameter(tensor, requires_grad=False)
                else:
                    module._buffers[name] = tensor
    return model


def take_tokens_alone(model: CausalLM, *, positions: bool) -> None:
    """Have the module take `input_ids` [B, S] and return all logits [B, S, V], without a cache.

    It is given a mask of ones: without one, `transformers` looks for several sequences packed into one row, of which a
    graph would keep the operators. `positions` says whether it is given them for each sequence, where it takes any: its
    own are one row for the whole batch, which the RotaryEmbedding of ONNX does not take.
    """
    import torch

    original = type(model.module).forward
    numbered = positions and model.takes_positions

    def forward(self: torch.nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
        mask = torch.ones_like(input_ids)
        extra = {"position_ids": torch.arange(input_ids.shape[1]).expand(input_ids.shape)} if numbered else {}
        logits: torch.Tensor = original(self, input_ids=input_ids, attention_mask=mask, use_cache=False, **extra).logits
        return logits

    model.module.forward = types.MethodType(forward, model.module)


def torch_view(array: np.ndarray) -> torch.Tensor:
    """A tensor over the array's memory, which must not be written to."""
    import numpy as np
    import torch

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable.*")
        if array.dtype.name == "bfloat16":
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)


def first_cause(error: BaseException) -> str:
    """One line that says what an error goes back to."""
    while error.__cause__ is not None:
        error = error.__cause__
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


def refused_operator(error: BaseException) -> str | None:
    """The operator of torch that an exporter's error speaks of, such as aten.sort.stable; None where it names none."""
    found = None
    cause: BaseException | None = error
    while cause is not None:
        if match := OPERATOR.search(str(cause)):
            found = match["target"] or ".".join(filter(None, (match["op"], match["overload"])))
        cause = cause.__cause__
    return found


def _compute_in_float32(module: torch.nn.Module) -> None:
    """Have the module's own half-precision tensors be float32 while its forward runs, and dropped after it."""
    import torch

    half = (torch.float16, torch.bfloat16)
    stored: dict[str, torch.nn.Parameter] = {}
    for name, parameter in module._parameters.items():
        if parameter is not None and parameter.dtype in half:
            stored[name] = parameter
    for name, buffer in module._buffers.items():
        if buffer is not None and buffer.dtype in half:
            module._buffers[name] = buffer.float()
    if not stored:
        return

    def before(module: torch.nn.Module, _: Any) -> None:
        for name, parameter in stored.items():
            module._parameters[name] = torch.nn.Parameter(parameter.float(), requires_grad=False)

    def after(module: torch.nn.Module, _: Any, __: Any) -> None:
        module._parameters.update(stored)

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after)


def _build(artifact: Artifact, stand_in: Callable[[torch.nn.Parameter], torch.nn.Parameter]) -> CausalLM:
    """The model with `stand_in` called for every parameter as soon as it is made, before it takes memory."""
    import torch

    config = causal_lm_config(artifact)
    config.use_cache = True
    try:
        cls = _model_class(artifact, config)
        attention = "sdpa" if getattr(cls, "_supports_sdpa", False) else "eager"
        with _parameters_replaced(stand_in):
            module = cls._from_config(config, attn_implementation=attention, dtype=torch.float32)
    except Exception as error:  # a wrong configuration fails anywhere inside transformers
        raise PipelineError(
            f"transformers cannot build the {config.model_type!r} model of this config.json: {first_cause(error)}"
        ) from error
    module.eval()
    sources = _sources(artifact, module)
    _untie(module, stand_in)
    return CausalLM(module, sources)


@contextmanager
def _parameters_replaced(stand_in: Callable[[torch.nn.Parameter], torch.nn.Parameter]) -> Iterator[None]:
    """Within, a module keeps `stand_in(parameter)` in place of each new parameter; buffers are left alone."""
    import torch

    register = torch.nn.Module.register_parameter
    made: set[int] = set()
    kept = []  # so that no id is used twice

    def replaced(self: torch.nn.Module, name: str, param: torch.nn.Parameter | None) -> None:
        if param is not None and id(param) not in made:
            param = stand_in(param)
            made.add(id(param))
            kept.append(param)
        register(self, name, param)

    torch.nn.Module.register_parameter = replaced
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register


def _sources(artifact: Artifact, module: torch.nn.Module) -> dict[str, str]:
    """Tensor of the checkpoint for each parameter, and for each buffer that checkpoints hold.

    A parameter that the checkpoint lacks takes the tensor of one that it is tied to.

    Raises: PipelineError where a parameter has no tensor, or one of another shape.
    """
    stored = artifact.component.tensors
    names: dict[int, list[str]] = {}
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        names.setdefault(id(parameter), []).append(name)
    prefix = f"{getattr(module, 'base_model_prefix', '')}."
    sources: dict[str, str] = {}
    for name, parameter in parameters.items():
        aliases = [name, *names[id(parameter)]]
        spellings = [s for alias in aliases for s in (alias, alias.removeprefix(prefix), prefix + alias)]
        source = next((s for s in spellings if s in stored), None)
        if source is None:
            raise PipelineError(
                f"the checkpoint has no tensor for the parameter {name!r}",
                hint="export_onnx refers to the checkpoint's tensors as they are: each must be one of the model's",
            )
        if stored[source].shape != tuple(parameter.shape):
            raise PipelineError(
                f"the checkpoint's {source!r} has shape {list(stored[source].shape)}; "
                f"the model of its config.json has {list(parameter.shape)}"
            )
        sources[name] = source
    persistent = module.state_dict(keep_vars=True).keys() - parameters.keys()
    shapes = {name: tuple(buffer.shape) for name, buffer in module.named_buffers(remove_duplicate=False)}
    sources.update({n: n for n in sorted(persistent) if n in stored and stored[n].shape == shapes.get(n)})
    return sources


def _untie(module: torch.nn.Module, stand_in: Callable[[torch.nn.Parameter], torch.nn.Parameter]) -> None:
    """Give every name a parameter of its own, so that a trace tells the embedding's uses from the head's."""
    seen: set[int] = set()
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is None:
                continue
            if id(parameter) in seen:
                part._parameters[name] = stand_in(parameter)
            seen.add(id(part._parameters[name]))
