"""What one iteration asks of a machine, counted from the artifact: bytes read from memory, and operations.

Bytes are those that cannot stay in a cache: weights as the operators take them, each once however many sequences there
are; of tables that tokens are looked up in, the rows; of the key-value cache, the positions that are there. Values
between operators are not counted, nor copies that a runtime makes. Operations are those of matrix products, attention
among them: a multiply-add counts two. Attention counts every pair of a token and a position that it is compared with,
masked or not, as kernels compute them.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any, NamedTuple

from pydantic import Field

from pipeline.artifact import Artifact, Frozen
from pipeline.measure.workload import Point
from pipeline.memory_estimate import EMBEDDINGS, HEADS, PLAIN_DTYPES, Decoder, decoder_of
from pipeline.runtime.component_alone import component_alone
from pipeline.runtime.phases import phases_of

WORK_VERSION = 3
"""Enters the key of cached counts: raised when the same artifact would be counted otherwise."""

OTHER_KINDS = (
    "num_local_experts",
    "num_experts",
    "n_routed_experts",
    "kv_lora_rank",
    "state_size",
    "linear_num_key_heads",
)
"""Fields of configurations whose models do other work than a dense decoder: torch's are not counted."""


class Extent(NamedTuple):
    """The sizes of one iteration: `length` tokens in each of `batch` sequences, after `past` positions in the cache."""

    batch: int
    length: int
    past: int
    keep: int
    """Positions whose logits are computed, where the model can leave the others out."""

    @property
    def tokens(self) -> int:
        return self.batch * self.length


def extent_of(point: Point) -> Extent:
    """What is run at a workload point: for decode, the token in the middle of those that follow the prompt."""
    if point.kind == "decode":
        return Extent(point.batch, 1, point.prompt + point.new_tokens // 2, 1)
    return Extent(point.batch, point.prompt, 0, 1 if point.kind == "prefill" else point.prompt)


class Work(Frozen):
    """What one iteration reads and computes."""

    tokens: int = Field(ge=1, description="that one iteration processes")
    weights_bytes: int
    rows_bytes: int = Field(0, description="rows of tables that tokens and positions are looked up in")
    cache_bytes: int = Field(0, description="keys and values that are there before")
    flops: dict[str, int] = Field(description="data type that products compute in -> operations")
    launches: int = Field(description="operators that run, or for torch, layers")
    uncounted: tuple[str, ...] = Field((), description="operators whose products could not be counted")

    @property
    def bytes_read(self) -> int:
        return self.weights_bytes + self.rows_bytes + self.cache_bytes

    @property
    def total_flops(self) -> int | None:
        """None where some are not counted."""
        return None if self.uncounted else sum(self.flops.values())

    @property
    def compute_dtype(self) -> str | None:
        """The data type of most operations."""
        return max(self.flops, key=lambda dtype: self.flops[dtype], default=None)


def count_work(artifact: Artifact, extent: Extent, *, device: str = "cpu") -> Work | None:
    """What one iteration of that extent asks of a machine; None where that is not known of such an artifact.

    Of an artifact with a component for prompts and one for single tokens it is the work of the one that would run.

    Raises: PipelineError where a graph cannot be read, or nothing says which of two components runs.
    """
    if phases := phases_of(artifact):
        artifact = component_alone(artifact, phases.component_for(extent.tokens))
    if len(artifact.manifest.components) != 1:
        return None
    if artifact.format == "onnx":
        from pipeline.measure.graph_work import count_graph

        return count_graph(artifact, extent, device=device)
    return _count_torch(artifact, extent) if artifact.format == "torch" else None


# --- torch: from the configuration and the header of the weights -----------------------------------------------------


def _count_torch(artifact: Artifact, extent: Extent) -> Work | None:
    """A dense decoder of transformers: every matrix is multiplied by once a token, the head where logits are kept."""
    config = artifact.read_json("config.json")
    text = config.get("text_config", config)
    decoder = decoder_of(config)
    if decoder is None or artifact.manifest.transforms or any(text.get(name) for name in OTHER_KINDS):
        return None
    dtype = _dtype(artifact, config)
    size = PLAIN_DTYPES.get(dtype, 4)
    matrices, others, tables = 0, 0, {}
    head = None
    component = artifact.component
    seen = set()
    for name, ref in component.tensors.items():
        place = component.files[ref.file].digest, ref.offset, ref.length
        elements, parts = prod(ref.shape), name.split(".")
        if any(part in HEADS for part in parts) and len(ref.shape) == 2:
            head = elements  # it may be the same bytes as the embedding
        elif place in seen:
            continue
        elif any(part in EMBEDDINGS for part in parts):
            tables[name] = ref.shape
        elif len(ref.shape) == 2:
            matrices += elements
        else:
            others += elements
        seen.add(place)
    if head is None:
        head = decoder.vocab * decoder.hidden
    if not matrices:
        return None
    products = 2 * (matrices * extent.tokens + head * extent.batch * extent.keep)
    attended = sum(_attended(decoder, artifact, text, extent))
    attention = 4 * extent.batch * extent.length * decoder.heads * decoder.head_dim * attended
    cached = sum(_cached(decoder, artifact, text, extent))
    return Work(
        tokens=extent.tokens,
        weights_bytes=(matrices + others + head) * size,
        rows_bytes=sum(extent.tokens * prod(shape[1:]) * size for shape in tables.values()),
        cache_bytes=2 * extent.batch * decoder.kv_heads * decoder.head_dim * size * cached,
        flops={dtype: products + attention},
        launches=decoder.layers,
    )


def _dtype(artifact: Artifact, config: Mapping[str, Any]) -> str:
    """The data type that the torch runner computes in."""
    wanted = str(artifact.manifest.execution.get("dtype", "auto"))
    if wanted != "auto":
        return wanted
    named = config.get("dtype") or config.get("torch_dtype")
    if named in PLAIN_DTYPES:
        return str(named)
    stored = [ref.dtype for ref in artifact.component.tensors.values() if len(ref.shape) == 2]
    return max(set(stored), key=stored.count, default="float32")


def _positions(artifact: Artifact, extent: Extent) -> int:
    """Positions that attention runs over: those there are, or all that a static cache has."""
    execution = artifact.manifest.execution
    if execution.get("cache") == "static" and execution.get("max_length"):
        return int(execution["max_length"])
    return extent.past + extent.length


def _windows(decoder: Decoder, text: Mapping[str, Any]) -> list[int | None]:
    """By layer: how many positions a token sees; None: all."""
    window = text.get("sliding_window")
    if not window or text.get("use_sliding_window") is False:
        return [None] * decoder.layers
    kinds = text.get("layer_types") or ["sliding_attention"] * decoder.layers
    return [int(window) if kind == "sliding_attention" else None for kind in kinds]


def _attended(decoder: Decoder, artifact: Artifact, text: Mapping[str, Any], extent: Extent) -> list[int]:
    """By layer: the positions that each token is compared with. A prompt's mask leaves none out of the product."""
    positions = _positions(artifact, extent)
    windows = _windows(decoder, text)
    return [positions if w is None or extent.length > 1 else min(positions, w) for w in windows]


def _cached(decoder: Decoder, artifact: Artifact, text: Mapping[str, Any], extent: Extent) -> list[int]:
    """By layer: the positions whose keys and values are read from the cache."""
    there = 0 if not extent.past else _positions(artifact, extent) - extent.length
    return [there if w is None else min(there, w) for w in _windows(decoder, text)]
