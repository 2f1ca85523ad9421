"""Weights of an architecture, drawn from a seed and streamed into a safetensors file.

The model is built with parameters that have shapes and no bytes. Then one part after the other (a decoder layer, an
embedding) gets memory, is initialised as its architecture does it, is written, and loses its memory again: what a
model of any size needs is that of its largest part. Every module draws from a generator of its own, seeded by the seed
and the module's name, so that what it gets does not depend on what was drawn before.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.artifact import MAIN_COMPONENT, Artifact, Component, Interface, Manifest
from pipeline.errors import PipelineError
from pipeline.models.architecture import check_fields
from pipeline.models.checkpoint import MODEL
from pipeline.models.outlier_channels import Outliers, norms_behind, put_outliers
from pipeline.models.safetensors import DTYPES, read_header
from pipeline.models.transformers_index import LEGACY_FIELDS
from pipeline.store.writer import BlobStream, OutputWriter

if TYPE_CHECKING:
    import torch

NAMES = {name: code for code, (name, _) in DTYPES.items()}
DEFAULT_STD = 0.02
"""For parameters that an architecture does not initialise, where it does not say how wide."""


@dataclass(frozen=True)
class Place:
    """A parameter or a buffer of a module, by its name in the checkpoint."""

    key: str
    module: Any
    attribute: str

    @property
    def tensor(self) -> Any:
        return getattr(self.module, self.attribute)


def draw_model(
    params: Mapping[str, Any], output: OutputWriter, progress: Callable[[float, str], None], blobs: Path
) -> Artifact:
    """The artifact of format torch that `params` ask for: {architecture: {type, seed, config}, dtype}.

    The architecture may have `outlier_channels`, too: {share, scale: [low, high]}.

    Raises: PipelineError where transformers cannot build the architecture.
    """
    wanted = params["architecture"]
    progress(0.0, "building the architecture")
    config = build_config(str(wanted["type"]), dict(wanted["config"]))
    model = build_model(config, str(params["dtype"]))
    config = model.config
    outliers = None
    if (given := wanted.get("outlier_channels")) is not None:
        low, high = given["scale"]
        outliers = Outliers(share=given["share"], low=low, high=high)
    stream = output.stream()
    seed = int(wanted["seed"])
    write_weights(model, seed, stream, lambda done: progress(done, "drawing weights"), outliers=outliers)
    entry = stream.close()
    tensors = {name: ref.model_copy(update={"file": MODEL}) for name, ref in read_header(stream.path).items()}
    config.architectures = [type(model).__name__]
    files = {"config.json": output.file("config.json", _json(config.to_diff_dict()))}
    if model.can_generate() and model.generation_config is not None:
        generation = model.generation_config.to_diff_dict()
        files["generation_config.json"] = output.file("generation_config.json", _json(generation))
    text = config.get_text_config()
    length = getattr(text, "max_position_embeddings", None)
    manifest = Manifest(
        format="torch",
        components={MAIN_COMPONENT: Component(format="torch", files={MODEL: entry}, tensors=tensors)},
        files=files,
        interface=Interface(task="causal-lm", vocab_size=text.vocab_size, max_length=length),
        execution={"dtype": str(params["dtype"])},
    )
    return Artifact(manifest, blobs)


def build_config(kind: str, fields: dict[str, Any]) -> Any:
    """The configuration with these fields.

    Raises: PipelineError where a field is unknown or its value is refused.
    """
    from transformers import CONFIG_MAPPING

    if kind not in CONFIG_MAPPING:
        raise PipelineError(f"transformers has no architecture {kind!r}")
    try:
        cls = CONFIG_MAPPING[kind]
        known = {name for name in vars(cls()) if not name.startswith("_")}
        check_fields(kind, fields, frozenset(known | set(cls.attribute_map) | LEGACY_FIELDS))
        return cls(**fields)
    except PipelineError:
        raise
    except Exception as error:  # configurations check themselves, each with exceptions of its own
        raise PipelineError(f"the configuration of {kind!r} is refused: {_sentence(error)}") from error


def build_model(config: Any, dtype: str) -> Any:
    """The causal language model with parameters that have shapes and no bytes; its buffers have their values.

    Raises: PipelineError where there is none for this configuration, or its sizes do not go together.
    """
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise PipelineError(f"{config.model_type!r} is not a causal language model")
    try:
        with _parameters_on_meta():
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), trust_remote_code=False)
    except Exception as error:  # sizes that do not go together fail anywhere inside the architecture
        raise PipelineError(f"transformers cannot build this {config.model_type} model: {_sentence(error)}") from error
    model.tie_weights()
    return model.eval()


def write_weights(
    model: Any,
    seed: int,
    stream: BlobStream,
    progress: Callable[[float], None],
    *,
    outliers: Outliers | None = None,
) -> None:
    """Draw every parameter and write all, and the buffers that checkpoints hold, as one safetensors file.

    Tied parameters are written once, under the first of their names. `outliers` change none of the values that are
    drawn, but scale some of them.

    Raises: PipelineError where outliers are wanted of a model that has not its family's modules.
    """
    import torch

    behind = norms_behind(model, model.config.model_type) if outliers is not None else {}
    parts: list[tuple[list[tuple[str, Any]], list[Place]]] = []
    seen: set[int] = set()
    for modules in _parts(model):
        places = [place for name, module in modules for place in _places(name, module)]
        fresh = [place for place in places if id(place.tensor) not in seen]
        seen |= {id(place.tensor) for place in fresh}
        if fresh:
            parts.append((modules, fresh))
    stream.write(_header(place for _, places in parts for place in places))
    for done, (modules, places) in enumerate(parts):
        progress(done / len(parts))
        _draw(model, modules, places, seed)
        for place in places:
            if outliers is not None and (norm := behind.get(place.key)):
                weight = place.tensor
                put_outliers(
                    weight, outliers.factors(weight.shape[-1], _seed_of(seed, f"{norm} outliers"), weight.dtype)
                )
            flat = place.tensor.detach().contiguous().reshape(-1)
            stream.write(flat.view(torch.uint8).numpy().data)
            if place.attribute in place.module._parameters:
                place.module._parameters[place.attribute] = None


def _parts(model: Any) -> Iterator[list[tuple[str, Any]]]:
    """Modules with their names, in groups that get memory together.

    An element of a list, such as a decoder layer, is one group, for some architectures initialise a layer's matrices
    from the layer; other modules stand alone.
    """
    from torch import nn

    def walk(name: str, module: Any) -> Iterator[list[tuple[str, Any]]]:
        yield [(name, module)]
        for child, inner in module.named_children():
            path = _join(name, child)
            if isinstance(module, nn.ModuleList):
                yield [(_join(path, below), part) for below, part in inner.named_modules()]
            else:
                yield from walk(path, inner)

    yield from walk("", model)


def _places(name: str, module: Any) -> Iterator[Place]:
    """The module's own parameters and the buffers that checkpoints hold."""
    buffers = [b for b in module._buffers if b not in module._non_persistent_buffers_set]
    for attribute in (*module._parameters, *buffers):
        if getattr(module, attribute) is not None:
            yield Place(_join(name, attribute), module, attribute)


def _draw(model: Any, modules: list[tuple[str, Any]], places: list[Place], seed: int) -> None:
    """Give these parameters memory and the values that the architecture starts from."""
    import torch

    for place in places:
        if place.attribute in place.module._parameters:
            # not a number until it is initialised: what an architecture forgets is seen
            memory = torch.full(place.tensor.shape, torch.nan, dtype=place.tensor.dtype)
            place.module._parameters[place.attribute] = torch.nn.Parameter(memory, requires_grad=False)
    with torch.no_grad():
        for name, module in reversed(modules):  # children first: a layer may set its matrices once more
            torch.manual_seed(_seed_of(seed, name))
            model._init_weights(module)
        for place in places:
            tensor = place.tensor
            if tensor.is_floating_point() and torch.isnan(tensor).any():
                torch.manual_seed(_seed_of(seed, place.key))
                tensor.normal_(0.0, getattr(model.config, "initializer_range", None) or DEFAULT_STD)


def _join(*names: str) -> str:
    return ".".join(filter(None, names))


def _seed_of(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "little") >> 1


def _header(places: Iterable[Place]) -> bytes:
    """Length and header of a safetensors file that holds these tensors one after another."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for place in places:
        tensor = place.tensor
        begin, end = end, end + tensor.numel() * tensor.element_size()
        dtype = NAMES[str(tensor.dtype).removeprefix("torch.")]
        entries[place.key] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Within, a module's new parameters lose their memory as soon as they are made; buffers keep theirs."""
    import torch

    register = torch.nn.Module.register_parameter

    def without_memory(self: torch.nn.Module, name: str, param: torch.nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            param = torch.nn.Parameter(param.to("meta"), requires_grad=False)
        register(self, name, param)

    torch.nn.Module.register_parameter = without_memory
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register


def _sentence(error: BaseException) -> str:
    """What an error goes back to, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines)[:300]
    return f"{type(error).__name__} {text}".strip() if isinstance(error, KeyError) or not text else text


def _json(data: dict[str, Any]) -> bytes:
    return (json.dumps(data, indent=2, sort_keys=True, default=_plain) + "\n").encode()


def _plain(value: Any) -> str:
    """A torch data type as configurations write it."""
    return str(value).removeprefix("torch.")
