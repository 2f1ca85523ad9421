"""An ONNX file of the user's as a source: how to call its graph, and where its weights lie.

Nothing is copied and no weight is read: the artifact refers to the file, and to the files beside it that hold its
external data, where they lie.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.artifact import (
    MAIN_COMPONENT,
    ONNX_FILE,
    Artifact,
    CacheLayout,
    Component,
    FileEntry,
    Interface,
    Manifest,
    TensorRef,
    safe_name,
)
from pipeline.errors import PipelineError, RecipeError
from pipeline.models.checkpoint import head_size, max_length, read_json
from pipeline.models.onnx_header import DTYPES, ExternalTensor, OnnxHeader, Value, read_onnx_header
from pipeline.store import Store
from pipeline.store.writer import weights_name

GENAI_CONFIG = "genai_config.json"

ROLES = {
    "tokens": ("input_ids", "tokens"),
    "mask": ("attention_mask",),
    "positions": ("position_ids",),
}
"""Role -> names that exporters give it: optimum's, onnxruntime-genai's and our own."""

KEEP = ("logits_to_keep", "num_logits_to_keep")
CACHE = re.compile(r"^(past|past_key_values|present|present_key_values)[._](\d+)[._](key|value)$")
BYTES = {"float64": 8, "int64": 8, "uint64": 8, "float32": 4, "int32": 4, "uint32": 4, "float16": 2, "bfloat16": 2}
BYTES |= {"int16": 2, "uint16": 2}
"""Bytes of an element; 1 for the other types that we know."""

FOREIGN = {
    "use_cache_branch": "a merged decoder, two graphs in one; export it without merging",
    "encoder_hidden_states": "the decoder of an encoder-decoder",
    "decoder_input_ids": "an encoder-decoder",
    "inputs_embeds": "a part of a multimodal model, which takes embeddings for tokens",
    "token_type_ids": "an encoder",
    "pixel_values": "a vision model",
    "input_features": "a speech model",
}
"""Inputs that tell what a graph is instead."""

EXPECTED = (
    "expected: input_ids [batch, sequence]; logits [batch, sequence, vocabulary]; attention_mask and position_ids "
    "where it needs them; for a cache, past_key_values.N.key and .value [batch, heads, past, size], and present.N.key "
    "and .value"
)


@dataclass(frozen=True)
class OnnxFile:
    """A graph that can be a source: how to call it and the files that belong to it."""

    path: Path
    interface: Interface
    parameters: int
    tensors: dict[str, tuple[Path, TensorRef]]
    """External initializer -> (file that holds it, where in it; the reference's file is the location in the graph)."""

    @property
    def data_files(self) -> list[Path]:
        return sorted({path for path, _ in self.tensors.values()})


def read_onnx_file(path: Path, companions: dict[str, Path]) -> OnnxFile:
    """Read the graph's header, its interface and the places of its weights.

    Raises: RecipeError where it is no causal language model, or its weights are not there.
    """
    try:
        header = read_onnx_header(path)
    except PipelineError as error:
        raise RecipeError(error.message) from None
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}") from None
    interface = read_interface(header, path, companions)
    if header.hidden:
        raise RecipeError(
            f"{path} keeps {', '.join(header.hidden[:3])} of a node, subgraph or function in another file",
            hint="only the dense initializers of the main graph may lie outside",
        )
    tensors = {tensor.name: _place(tensor, path) for tensor in header.external}
    return OnnxFile(path=path, interface=interface, parameters=header.parameters, tensors=tensors)


def onnx_artifact(found: OnnxFile, companions: dict[str, Path], store: Store) -> Artifact:
    """The graph as an artifact of format onnx that refers to the user's files."""
    entries = {path: store.reference(path) for path in found.data_files}
    files: dict[str, FileEntry] = {ONNX_FILE: store.reference(found.path)}
    files |= {weights_name(entry): entry for entry in entries.values()}
    tensors = {
        name: ref.model_copy(update={"file": weights_name(entries[path])})
        for name, (path, ref) in sorted(found.tensors.items())
    }
    manifest = Manifest(
        format="onnx",
        components={MAIN_COMPONENT: Component(format="onnx", files=files, tensors=tensors)},
        files={name: store.reference(path) for name, path in companions.items()},
        interface=found.interface,
    )
    return Artifact(manifest, store.blobs)


def read_interface(header: OnnxHeader, path: Path, companions: dict[str, Path]) -> Interface:
    """Roles, cache and limits of a causal language model's graph. One that takes no cache is called without.

    Raises: RecipeError where the graph is none, or nothing says how long a sequence may be.
    """
    inputs = {value.name: value for value in header.inputs}
    outputs = {value.name: value for value in header.outputs}

    def refuse(why: str) -> RecipeError:
        found = f"inputs {_listing(header.inputs)}; outputs {_listing(header.outputs)}"
        return RecipeError(f"{path} is not a causal language model: {why}", hint=f"{found}\n  {EXPECTED}")

    for name, what in FOREIGN.items():
        if name in inputs:
            raise refuse(f"its input {name} is that of {what}")
    roles = {role: name for role, names in ROLES.items() for name in names if name in inputs}
    if "tokens" not in roles:
        raise refuse("it has no input input_ids")
    if "logits" not in outputs:
        raise refuse("it has no output logits")
    past, present = _cache_names(header.inputs), _cache_names(header.outputs)
    if not past:
        present = {}  # what a first pass would leave for a second graph
    elif not present:
        raise refuse("it takes a cache, and has no outputs present.N.key that make one")
    if past.keys() != present.keys() or past.keys() != {(i, p) for i in range(len(past) // 2) for p in "kv"}:
        raise refuse(f"its cache has {len(past)} inputs and {len(present)} outputs that do not go together")
    keep = next((name for name in KEEP if name in inputs), None)
    unknown = set(inputs) - set(roles.values()) - {value.name for value in past.values()} - {keep}
    if unknown:
        raise refuse(f"it has inputs that no one fills: {', '.join(sorted(unknown))}")
    tokens, logits = inputs[roles["tokens"]], outputs["logits"]
    if tokens.shape is not None and len(tokens.shape) == 2 and isinstance(tokens.shape[1], int):
        raise refuse(f"it takes exactly {tokens.shape[1]} tokens at a time")
    if keep is None and logits.shape is not None and len(logits.shape) == 3 and logits.shape[1] == 1:
        raise refuse("it gives the logits of the last position only, and quality is measured on all of them")
    config = _configs(companions)
    cache = _cache_layout(past, config, refuse) if past else None
    vocabulary = logits.shape[-1] if logits.shape else None
    vocab_size = vocabulary if isinstance(vocabulary, int) else config.vocab_size
    if vocab_size is None:
        raise refuse("neither the shape of logits nor a config.json beside it says how large the vocabulary is")
    if config.max_length is None:
        raise RecipeError(
            f"nothing says how many positions {path} takes",
            hint=f'put a config.json with {{"max_position_embeddings": N}} into {path.parent}, or the {GENAI_CONFIG} '
            "of onnxruntime-genai with model.context_length",
        )
    return Interface(
        task="causal-lm",
        inputs={**roles, **{f"past.{part}[{i}]": past[i, part].name for i, part in sorted(past)}},
        outputs={"logits": "logits", **{f"present.{part}[{i}]": present[i, part].name for i, part in sorted(present)}},
        cache=cache,
        vocab_size=vocab_size,
        max_length=config.max_length,
        logits_to_keep=keep,
    )


def _cache_names(values: tuple[Value, ...]) -> dict[tuple[int, str], Value]:
    """(layer, k or v) -> input or output."""
    found = {}
    for value in values:
        if match := CACHE.match(value.name):
            found[int(match[2]), match[3][0]] = value
    return found


def _cache_layout(past: dict[tuple[int, str], Value], config: _Limits, refuse: Any) -> CacheLayout:
    """Layers, heads and their size, from the shapes; what those leave open, from the configuration."""
    found = set()
    for value in past.values():
        if value.shape is None or len(value.shape) != 4:
            raise refuse(f"{value.name} has shape {_shape(value)} instead of [batch, heads, past, size]")
        if isinstance(value.shape[2], int):
            raise refuse(f"{value.name} has room for exactly {value.shape[2]} positions; it has to grow")
        if value.dtype not in DTYPES.values():
            raise refuse(f"{value.name} has {value.dtype or 'no data type'}")
        heads, size = value.shape[1], value.shape[3]
        found.add(
            (
                heads if isinstance(heads, int) else config.kv_heads,
                size if isinstance(size, int) else config.head_dim,
                value.dtype,
            )
        )
    if len(found) != 1:
        raise refuse("the layers of its cache differ in heads, size or data type")
    kv_heads, head_dim, dtype = found.pop()
    if kv_heads is None or head_dim is None:
        raise refuse("neither the shapes of its cache nor a config.json beside it say how many heads there are")
    return CacheLayout(layers=len(past) // 2, kv_heads=kv_heads, head_dim=head_dim, dtype=str(dtype))


@dataclass(frozen=True)
class _Limits:
    """What configurations beside the graph say; None where they say nothing."""

    vocab_size: int | None
    max_length: int | None
    kv_heads: int | None
    head_dim: int | None


def _configs(companions: dict[str, Path]) -> _Limits:
    config = read_json(companions["config.json"]) if "config.json" in companions else {}
    text = config.get("text_config", config)
    genai = read_json(companions[GENAI_CONFIG]).get("model", {}) if GENAI_CONFIG in companions else {}
    decoder = genai.get("decoder", {})
    heads = text.get("num_key_value_heads") or text.get("num_attention_heads") or decoder.get("num_key_value_heads")
    return _Limits(
        vocab_size=_positive(text.get("vocab_size") or genai.get("vocab_size")),
        max_length=max_length(config) or _positive(genai.get("context_length")),
        kv_heads=_positive(heads),
        head_dim=_positive(head_size(text) or decoder.get("head_size")),
    )


def _positive(value: object) -> int | None:
    return value if isinstance(value, int) and value > 0 else None


def _place(tensor: ExternalTensor, path: Path) -> tuple[Path, TensorRef]:
    """The file that holds an external initializer, and where in it.

    Raises: RecipeError where the graph's entry is wrong, or its file is not there or too short.
    """
    where = f"{path}: initializer {tensor.name!r}"
    if tensor.data_type not in DTYPES:
        raise RecipeError(
            f"{where} lies outside the file and has ONNX data type {tensor.data_type}, of less than a byte or of text",
            hint="save the model so that such initializers stay inside",
        )
    dtype = DTYPES[tensor.data_type]
    needed = prod(tensor.shape) * BYTES.get(dtype, 1)
    length = needed if tensor.length is None else tensor.length
    if min(tensor.offset, needed, *tensor.shape, 0) < 0 or length != needed:
        raise RecipeError(f"{where} has shape {list(tensor.shape)} of {dtype}, offset {tensor.offset}, {length} bytes")
    file = _data_file(tensor.location, path, where)
    size = file.stat().st_size
    if tensor.offset + length > size:
        raise RecipeError(f"{file} is cut off: {tensor.name!r} ends at {tensor.offset + length:,} of {size:,} bytes")
    ref = TensorRef(file=tensor.location, offset=tensor.offset, length=length, dtype=dtype, shape=tensor.shape)
    return file, ref


def _data_file(location: str, path: Path, where: str) -> Path:
    """The external file `location`, which may not leave the folder of the graph.

    The cache of the hub keeps a model's files as links into one folder of contents: a link may lead where the graph's
    own leads.
    """
    try:
        name = safe_name(location)
    except ValueError:
        raise RecipeError(f"{where} lies in {location!r}, outside the folder of the graph") from None
    file = path.parent / PurePosixPath(name)
    if not file.is_file():
        raise RecipeError(f"{where} lies in {file}, which is not there", hint="external data travel with the graph")
    settled = file.resolve()
    homes = (path.parent.resolve(), path.resolve().parent)
    if not any(settled.is_relative_to(home) for home in homes):
        raise RecipeError(f"{where}: {file} is a link to a place outside the folder of the graph")
    return settled


def _listing(values: tuple[Value, ...]) -> str:
    shown = ", ".join(f"{value.name} {_shape(value)}" for value in values[:4])
    return f"{shown} and {len(values) - 4} more" if len(values) > 4 else shown or "none"


def _shape(value: Value) -> str:
    return json.dumps(value.shape).replace('"', "").replace("null", "?")
