"""Memory that a stage takes, estimated from shapes before anything runs: no weight is read, no heavy library loaded.

All figures are bytes of anonymous and shared memory, as `pipeline.measure.memory` samples them, except those called
mapped: weights that stay in their file's pages. The constants below are measured; `benchmarks/memory_estimates.py`
runs a recipe and prints each estimate beside what was measured, which is how they were found and how they are checked.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from pipeline.artifact import ONNX_FILE, Artifact, Component, Frozen, TensorRef
from pipeline.models.safetensors import DTYPES

if TYPE_CHECKING:
    from pipeline.report.schema import PredictedMemory

MB = 10**6

RUNTIME_BYTES = {"torch": 288 * MB, "onnx": 62 * MB}
"""A worker's process with its libraries before the model's own memory: Python, torch and transformers; or Python, ONNX
Runtime and a session. By the artifact's format."""

CUDA_CONTEXT_BYTES = 600 * MB
"""What a CUDA context and the libraries' workspaces take of the device. An assumption: not measured here."""

UNKNOWN_CONVERSION_FACTOR = 2.0
UNKNOWN_CONVERSION_LIBRARIES_BYTES = 400 * MB
"""A pass that does not say what it takes is assumed to hold its parent's weights so many times, and its libraries."""

ONNX_PACKED = 1.1
ONNX_WIDENED = 1.5
"""ONNX Runtime on CPUs packs float weights of products when it loads them, and widens float16 and bfloat16 to float32
first. So many times their bytes in float32 are found in memory afterwards: packed ones, and what packing left."""

PLAIN_DTYPES = dict(DTYPES.values())
"""Data type -> bytes of an element."""

HALF = frozenset({"float16", "bfloat16"})

EMBEDDINGS = ("embed_tokens", "embed_in", "embed_positions", "word_embeddings", "wte", "wpe", "tok_embeddings")
HEADS = ("lm_head", "embed_out")
"""Parts of the names that tensors have in checkpoints."""

Kind = Literal["linear", "embedding", "head", "other"]
KINDS: tuple[Kind, ...] = ("linear", "embedding", "head", "other")


class Weights(Frozen):
    """The weights of one kind. Scales and zero points of quantized ones count in `bytes_per_parameter`."""

    parameters: NonNegativeInt = 0
    dtype: str = Field("float32", description="data type that they are stored in, such as bfloat16, int4")
    bytes_per_parameter: NonNegativeFloat = 4.0

    @property
    def size_bytes(self) -> int:
        return round(self.parameters * self.bytes_per_parameter)


class Decoder(Frozen):
    """The sizes of a decoder-only transformer that its memory follows from."""

    layers: PositiveInt
    heads: PositiveInt
    kv_heads: PositiveInt
    head_dim: PositiveInt
    hidden: PositiveInt
    intermediate: PositiveInt
    vocab: PositiveInt
    soft_capped: bool = Field(False, description="attention scores are capped, as Gemma 2 does")


class ModelSize(Frozen):
    """How large a model is, how its weights are stored, and what it computes in."""

    format: str = Field("torch", description="torch | onnx")
    linear: Weights = Weights()
    embedding: Weights = Weights()
    head: Weights = Weights()
    other: Weights = Weights()
    tied: bool = Field(False, description="the head reads the embedding's bytes: they are stored once")
    largest: NonNegativeInt = Field(0, description="parameters of the largest weight")
    dtype: str = Field("float32", description="data type of activations and cache")
    decoder: Decoder | None = Field(None, description="None where the configuration does not say")
    logits_to_keep: bool = Field(True, description="a prompt gives the logits of its last position alone")
    has_cache: bool = Field(True, description="it keeps keys and values; without, it knows whole passes only")
    prepacked: bool = Field(False, description="weights are stored as they are computed with, and so stay mapped")
    cache_in_place: bool = Field(
        False, description="GroupQueryAttention: a step appends to the cache where it lies, and keeps no scores"
    )
    phases: tuple[ModelSize, ...] = Field(
        (), description="the graphs for prompts and for single tokens, which are loaded both; empty: there is one"
    )

    def weights(self, kind: str) -> Weights:
        found: Weights = getattr(self, kind)
        return found

    @property
    def parameters(self) -> int:
        """Distinct ones: a tied head counts with the embedding."""
        return sum(self.weights(kind).parameters for kind in self.stored_kinds)

    @property
    def stored_kinds(self) -> tuple[Kind, ...]:
        return tuple(kind for kind in KINDS if not (kind == "head" and self.tied))

    @property
    def weights_bytes(self) -> int:
        """Bytes of the weights as they are stored; those that two phases have alike are stored once."""
        graphs = self.phases or (self,)
        return sum(w.size_bytes for kind in KINDS for w in {g.weights(kind) for g in graphs if kind in g.stored_kinds})

    def with_weights(self, kinds: Iterable[str], dtype: str, bytes_per_parameter: float) -> ModelSize:
        """The model with the weights of these kinds stored so. A head that is changed alone is no longer tied."""
        changed = set(kinds)
        update: dict[str, Any] = {
            kind: Weights(
                parameters=self.weights(kind).parameters, dtype=dtype, bytes_per_parameter=bytes_per_parameter
            )
            for kind in changed
        }
        if ("head" in changed) != ("embedding" in changed):
            update["tied"] = False
        return self.model_copy(update=update)


class Prediction(Frozen):
    """What a pass makes of a model, and the memory that making it takes."""

    model: ModelSize
    conversion_bytes: int | None = Field(
        None, description="peak of the pass's process, anonymous + shared; None: the pass does not know"
    )
    written_bytes: int | None = Field(None, description="of weights that it writes; None: those that are changed")


class Load(NamedTuple):
    """What a workload asks for at its largest."""

    batch: int
    prompt: int
    new_tokens: int
    whole: bool = False
    """A pass without a cache, which gives the logits of all positions."""


# --- what a model is -------------------------------------------------------------------------------------------------


def size_of_artifact(artifact: Artifact) -> ModelSize:
    """The size of an untouched model: its configuration and the places of its tensors. No weight is read."""
    manifest = artifact.manifest
    cache = manifest.interface.cache
    dtype = str(manifest.execution.get("dtype", "float32")) if artifact.format == "torch" else "float32"
    model = ModelSize(
        format=artifact.format,
        dtype=cache.dtype if cache else dtype,
        decoder=decoder_of(artifact.read_json("config.json")),
        logits_to_keep=artifact.format != "onnx" or manifest.interface.logits_to_keep is not None,
        has_cache=artifact.format != "onnx" or cache is not None,
        cache_in_place=cache is not None and cache.in_place,
    )
    tensors = {name: ref for part in manifest.components.values() for name, ref in part.tensors.items()}
    if not tensors and artifact.format == "onnx":  # the graph keeps its weights inside: as products in float32
        inside = sum(part.files[ONNX_FILE].size_bytes for part in manifest.components.values())
        return model.model_copy(update={"linear": Weights(parameters=inside // 4)})
    return _counted(model, tensors)


def size_of_config(config: Mapping[str, Any], *, dtype: str = "float32") -> ModelSize:
    """The size of a model of which only the configuration is known: gated MLPs, no biases, a norm before each block.

    Within a few percent for Llama and its relatives; weights of an architecture without a `decoder` count nothing.
    """
    decoder = decoder_of(config)
    if decoder is None:
        return ModelSize(dtype=dtype)
    attention = decoder.hidden * decoder.head_dim * 2 * (decoder.heads + decoder.kv_heads)
    mlp = 3 * decoder.hidden * decoder.intermediate
    table = decoder.vocab * decoder.hidden

    def stored(parameters: int) -> Weights:
        return Weights(parameters=parameters, dtype=dtype, bytes_per_parameter=PLAIN_DTYPES.get(dtype, 4))

    return ModelSize(
        dtype=dtype,
        linear=stored(decoder.layers * (attention + mlp)),
        embedding=stored(table),
        head=stored(table),
        other=stored((2 * decoder.layers + 1) * decoder.hidden),
        tied=bool(_text(config).get("tie_word_embeddings", config.get("tie_word_embeddings", False))),
        largest=max(table, decoder.hidden * decoder.intermediate),
        decoder=decoder,
    )


def corrected(model: ModelSize, artifact: Artifact) -> ModelSize:
    """`model`, as it was predicted, with what is known of an artifact that is there.

    These are the bytes that its weights really take, those of each phase where it has two, and for a graph how its
    cache and its logits are given.
    """
    parts = artifact.manifest.components
    told: dict[str, Any] = {}
    if artifact.format == "onnx":
        interface = artifact.interface
        told["logits_to_keep"] = interface.logits_to_keep is not None
        told["cache_in_place"] = interface.cache is not None and interface.cache.in_place
    whole = _with_bytes(model.model_copy(update=told), parts.values())
    if len(parts) == 1:
        return whole.model_copy(update={"phases": ()})
    return whole.model_copy(update={"phases": tuple(_phase(whole, part) for part in parts.values())})


def _phase(model: ModelSize, part: Component) -> ModelSize:
    """`model` with the bytes and data types of one component's weights."""
    found = _with_bytes(model.model_copy(update={"phases": ()}), [part])
    packed = any(PACKED in name for name in part.tensors)
    update: dict[str, Any] = {"prepacked": packed}
    for kind in KINDS:
        sizes: dict[str, int] = {}
        for name, ref in part.tensors.items():
            if _kind(name, ref) == kind and not (packed and PACKED in name):
                sizes[ref.dtype] = sizes.get(ref.dtype, 0) + ref.length
        if sizes and found.weights(kind).parameters:
            update[kind] = found.weights(kind).model_copy(update={"dtype": max(sizes, key=lambda name: sizes[name])})
    return found.model_copy(update=update)


PACKED = ".prepacked"
"""Part of the names of packed forms, which a compiled graph keeps beside its weights."""


def _with_bytes(model: ModelSize, parts: Iterable[Component]) -> ModelSize:
    """`model` with the bytes that these components' weights take, those that several names share once."""
    spans: dict[tuple[str, int, int], tuple[Kind, TensorRef]] = {}
    for part in parts:
        for name, ref in part.tensors.items():
            spans.setdefault((part.files[ref.file].digest, ref.offset, ref.length), (_kind(name, ref), ref))
    if not spans:
        return model
    found = dict.fromkeys(KINDS, 0)
    for kind, ref in spans.values():
        found[kind] += ref.length
    # scales of a quantized weight carry its name, and so its kind; a head under another name counts with the linear
    if model.head.parameters and not model.tied and not found["head"]:
        share = model.head.size_bytes / max(1, model.head.size_bytes + model.linear.size_bytes)
        found["head"] = round(found["linear"] * share)
        found["linear"] -= found["head"]
    update: dict[str, Any] = {}
    for kind in KINDS:
        weights = model.weights(kind)
        if weights.parameters and found[kind]:
            update[kind] = weights.model_copy(update={"bytes_per_parameter": found[kind] / weights.parameters})
    return model.model_copy(update=update)


def decoder_of(config: Mapping[str, Any]) -> Decoder | None:
    """The sizes that a config.json of transformers gives; None where one of them is missing or no number."""
    text = _text(config)
    hidden = _count(text, "hidden_size", "n_embd", "d_model")
    heads = _count(text, "num_attention_heads", "n_head", "num_heads")
    layers = _count(text, "num_hidden_layers", "n_layer", "num_layers")
    vocab = _count(text, "vocab_size")
    if hidden is None or heads is None or layers is None or vocab is None:
        return None
    return Decoder(
        layers=layers,
        heads=heads,
        kv_heads=_count(text, "num_key_value_heads", "num_kv_heads") or heads,
        head_dim=_count(text, "head_dim") or max(1, hidden // heads),
        hidden=hidden,
        intermediate=_count(text, "intermediate_size", "n_inner", "ffn_dim") or 4 * hidden,
        vocab=vocab,
        soft_capped=bool(text.get("attn_logit_softcapping")),
    )


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of the configuration that describes the language model."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def _count(config: Mapping[str, Any], *names: str) -> int | None:
    """The first of these fields that holds a whole number above 0."""
    found = (config.get(name) for name in names)
    return next((n for n in found if isinstance(n, int) and not isinstance(n, bool) and n > 0), None)


def _counted(model: ModelSize, tensors: Mapping[str, TensorRef]) -> ModelSize:
    """`model` with its weights counted from the tensors of a checkpoint."""
    sums: dict[Kind, dict[str, list[int]]] = {kind: {} for kind in KINDS}
    largest = 0
    for name, ref in tensors.items():
        elements = 1
        for length in ref.shape:
            elements *= length
        pair = sums[_kind(name, ref)].setdefault(ref.dtype, [0, 0])
        pair[0] += elements
        pair[1] += ref.length
        largest = max(largest, elements)
    update: dict[str, Any] = {"largest": largest}
    for kind, by_dtype in sums.items():
        parameters = sum(pair[0] for pair in by_dtype.values())
        size = sum(pair[1] for pair in by_dtype.values())
        if parameters:
            dtype = max(by_dtype, key=lambda name: by_dtype[name][0])
            update[kind] = Weights(parameters=parameters, dtype=dtype, bytes_per_parameter=size / parameters)
    if "head" not in update and "embedding" in update:
        decoder = model.decoder
        table = decoder.vocab * decoder.hidden if decoder else update["embedding"].parameters
        update["head"] = update["embedding"].model_copy(update={"parameters": table})
        update["tied"] = True
    return model.model_copy(update=update)


def _kind(name: str, ref: TensorRef) -> Kind:
    parts = name.split(".")
    if any(part in EMBEDDINGS for part in parts):
        return "embedding"
    if any(part in HEADS for part in parts):
        return "head"
    return "linear" if len(ref.shape) >= 2 or name.endswith((".scales", ".zero_points")) else "other"


# --- what running it takes -------------------------------------------------------------------------------------------


def kv_cache_bytes(decoder: Decoder, *, batch: int, length: int, dtype: str) -> int:
    """Keys and values [B, kv_heads, T, head_dim] of all layers."""
    values = 2 * decoder.layers * batch * decoder.kv_heads * length * decoder.head_dim
    return values * PLAIN_DTYPES.get(dtype, 4)


def activation_bytes(model: ModelSize, load: Load, *, device: str = "cpu") -> int | None:
    """The peak of a prompt's forward pass beside weights and cache; None where the model's sizes are not known.

    Attention scores [B, heads, S, S], three tensors of the MLP's width [B, S, I] and four of the hidden width
    [B, S, H], and the logits [B, S, V] in float32. An ONNX graph with a cache returns a new one beside the one that it
    was given. GroupQueryAttention does neither: it appends to the cache in place, and computes with blocks of scores,
    unless these are capped (measured: 2,048 tokens of 32 heads take 81 MB where Attention takes 625). In half
    precision, oneDNN lays the largest weight out anew for torch, and widens it, too, for more than one row.
    """
    decoder = model.decoder
    if decoder is None:
        return None
    size = PLAIN_DTYPES.get(model.dtype, 4)
    tokens = load.batch * load.prompt
    by_blocks = model.cache_in_place and not decoder.soft_capped
    scores = 0 if by_blocks else load.batch * decoder.heads * load.prompt * load.prompt
    hidden = tokens * (3 * decoder.intermediate + 4 * decoder.hidden)
    logits = (load.batch if model.logits_to_keep and not load.whole else tokens) * decoder.vocab * 4
    cache = 0
    if model.format == "onnx" and model.has_cache and not model.cache_in_place and not load.whole:
        length = load.prompt + load.new_tokens
        cache = kv_cache_bytes(decoder, batch=load.batch, length=length, dtype=model.dtype)
    scratch = 0
    if model.format == "torch" and model.dtype in HALF and device == "cpu":
        scratch = model.largest * (size if load.batch == 1 else size + 4)
    return (scores + hidden) * size + logits + cache + scratch


class Held(NamedTuple):
    """Weights of a loaded model."""

    memory_bytes: int
    mapped_bytes: int


def held_weights(model: ModelSize, *, device: str = "cpu") -> Held:
    """Where the weights are once the model is loaded.

    torch: mapped where the data type stays, else converted copies. ONNX Runtime: mapped, but for copies of those of
    products as its kernels take them, unless they were packed beforehand. On a GPU all are in the device's memory.
    Of two phases each has copies of its own; what both map alike is mapped once.
    """
    if device == "cuda":
        return Held(sum(map(_on_device, model.phases or (model,))), 0)
    memory = mapped = 0
    for kind in KINDS:
        maps: set[Weights] = set()
        for graph in model.phases or (model,):
            weights = graph.weights(kind)
            stored = weights.size_bytes if kind in graph.stored_kinds else 0
            if graph.format == "torch":
                if weights.dtype == graph.dtype or weights.dtype not in PLAIN_DTYPES:
                    maps |= {weights} if stored else set()
                elif stored:
                    memory += weights.parameters * PLAIN_DTYPES.get(graph.dtype, 4)
            elif model.prepacked or graph.prepacked or kind in ("embedding", "other"):
                maps |= {weights} if stored else set()
            elif weights.dtype in HALF:
                memory += round(weights.parameters * 4 * ONNX_WIDENED)
            elif weights.dtype == "float32":
                memory += round(weights.size_bytes * ONNX_PACKED)
            else:
                memory += weights.size_bytes
        mapped += sum(weights.size_bytes for weights in maps)
    return Held(memory, mapped)


def _on_device(model: ModelSize) -> int:
    """Bytes of the weights in a GPU's memory: converted for torch, as they are stored for ONNX Runtime."""
    size = 0
    for kind in model.stored_kinds:
        weights = model.weights(kind)
        converted = model.format == "torch" and weights.dtype in PLAIN_DTYPES
        size += weights.parameters * PLAIN_DTYPES.get(model.dtype, 4) if converted else weights.size_bytes
    return size


def predict_memory(
    prediction: Prediction,
    loads: Iterable[Load],
    *,
    device: str = "cpu",
    capacity_bytes: int | None = None,
) -> PredictedMemory:
    """Conversion and inference of one stage, the latter at the largest of these workloads.

    `capacity_bytes` is the target's memory: `fits` says whether inference, with the weights that are mapped, goes in.
    """
    from pipeline.report.schema import PredictedMemory  # what only runs a pass predicts nothing

    model = prediction.model
    held = held_weights(model, device=device)
    runtime = CUDA_CONTEXT_BYTES if device == "cuda" else RUNTIME_BYTES.get(model.format, RUNTIME_BYTES["torch"])
    cache = activations = None
    if model.decoder is not None:
        found = list(loads)
        cache = max(
            0
            if x.whole or not model.has_cache
            else kv_cache_bytes(model.decoder, batch=x.batch, length=x.prompt + x.new_tokens, dtype=model.dtype)
            for x in found
        )
        activations = max(activation_bytes(model, load, device=device) or 0 for load in found)
    inference = fits = None
    if cache is not None and activations is not None and model.parameters:
        inference = runtime + held.memory_bytes + cache + activations
        fits = None if capacity_bytes is None else inference + held.mapped_bytes <= capacity_bytes
    return PredictedMemory(
        conversion_bytes=prediction.conversion_bytes,
        inference_bytes=inference,
        weights_bytes=held.memory_bytes,
        mapped_bytes=held.mapped_bytes,
        kv_cache_bytes=cache,
        activations_bytes=activations,
        runtime_bytes=runtime,
        fits=fits,
    )


def unknown_conversion_bytes(model: ModelSize) -> int:
    """What a pass is assumed to take that does not say: its parent's weights twice, and libraries."""
    return round(model.weights_bytes * UNKNOWN_CONVERSION_FACTOR) + UNKNOWN_CONVERSION_LIBRARIES_BYTES
