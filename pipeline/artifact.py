"""What a stage yields: a manifest, small files, and weights by reference.

An artifact never holds weights in memory. Its manifest names files, each either a blob of the store or a file of the
user's that is referenced where it lies, and for every tensor the file, offset and length of its bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from pipeline.errors import PipelineError

if TYPE_CHECKING:
    import numpy as np

SCHEMA_VERSION = 2
"""Version of the manifest's schema; part of every stage key."""

ONNX_FILE = "model.onnx"
MAIN_COMPONENT = "model"


class Frozen(BaseModel):
    """A value: immutable, comparable, printable, with no unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def safe_name(name: str) -> str:
    """Return `name` if it is a relative path that stays in its folder, else raise ValueError."""
    path = PurePosixPath(name)
    if not name or "\\" in name or "\0" in name or path.is_absolute() or ".." in path.parts:
        raise ValueError(f"file name {name!r} would leave its folder")
    return name


class FileEntry(Frozen):
    """One file: a blob of the store, or (`path` set) a file referenced where it lies, never moved or changed."""

    digest: str = Field(pattern=r"^[0-9a-f]{64}$", description="SHA-256 of the contents")
    size_bytes: int = Field(ge=0)
    path: str | None = Field(None, description="absolute path of a referenced file; None for a blob of the store")
    mtime_ns: int | None = Field(None, description="modification time of the referenced file when it was digested")


class TensorRef(Frozen):
    """Where the raw little-endian bytes of a tensor lie."""

    file: str = Field(description="name of the file in the component")
    offset: int = Field(ge=0, description="bytes from the start of the file")
    length: int = Field(ge=0, description="bytes")
    dtype: str = Field(description="numpy's name of the data type, or ml_dtypes' (bfloat16)")
    shape: tuple[int, ...]


class Component(Frozen):
    """A named part of an artifact that one runtime can load."""

    format: str = Field(description="torch | onnx")
    files: dict[str, FileEntry] = Field(default_factory=dict)
    tensors: dict[str, TensorRef] = Field(default_factory=dict)

    @field_validator("files")
    @classmethod
    def _names_stay_inside(cls, files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        for name in files:
            safe_name(name)
        return files


class CacheLayout(Frozen):
    """Key-value cache of a causal LM: per layer a key and a value of shape [B, kv_heads, T, head_dim]."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: str = "float32"
    in_place: bool = Field(
        False,
        description="past and present may be one buffer with room for more positions than are filled, to which a step "
        "appends; else T is what is filled, and each step gives a new, longer present",
    )


class Interface(Frozen):
    """How a runner calls the artifact: the task and the tensor names by role."""

    task: str = Field("causal-lm", description="causal-lm | sequence-to-sequence | forward")
    inputs: dict[str, str] = Field(default_factory=dict, description="role -> tensor name, e.g. past.k[0]")
    outputs: dict[str, str] = Field(default_factory=dict)
    cache: CacheLayout | None = None
    vocab_size: int | None = None
    max_length: int | None = Field(None, description="largest number of positions, prompt and new tokens together")
    logits_to_keep: str | None = Field(None, description="input that limits the logits to the last tokens, if any")


class Lineage(Frozen):
    """Where an artifact came from. Not part of its digest."""

    stage_key: str
    stage: str
    pass_name: str
    parents: tuple[str, ...] = Field((), description="digests of the input artifacts")


class Manifest(Frozen):
    """All that an artifact is, but for the bytes of its files."""

    schema_version: int = SCHEMA_VERSION
    format: str
    components: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")], Component]
    files: dict[str, FileEntry] = Field(default_factory=dict, description="config, tokenizer …, shared by components")
    interface: Interface
    transforms: tuple[dict[str, Any], ...] = Field((), description="module transforms applied at load (torch)")
    execution: dict[str, Any] = Field(default_factory=dict, description="how a runner should load it, e.g. its dtype")
    lineage: Lineage | None = None

    @field_validator("files")
    @classmethod
    def _names_stay_inside(cls, files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        for name in files:
            safe_name(name)
        return files

    def digest(self) -> str:
        """SHA-256 over the files' names and digests and the rest of the manifest, without lineage, paths and times."""
        data = self.model_dump(mode="json", exclude={"lineage"})
        for files in (data["files"], *(c["files"] for c in data["components"].values())):
            for entry in files.values():
                del entry["path"], entry["mtime_ns"]
        return hashlib.sha256(canonical_json(data)).hexdigest()

    def entries(self) -> Iterator[tuple[str, FileEntry]]:
        """Every file of the artifact with its name, those of components as `component/name`."""
        yield from self.files.items()
        for part, component in self.components.items():
            for name, entry in component.files.items():
                yield f"{part}/{name}", entry

    @property
    def weights_bytes(self) -> int:
        """Bytes of all tensors; bytes that several names share count once."""
        spans = {
            (c.files[t.file].digest, t.offset, t.length) for c in self.components.values() for t in c.tensors.values()
        }
        return sum(length for _, _, length in spans)

    @property
    def size_bytes(self) -> int:
        """Bytes that the artifact takes when written out alone: its tensors and its other files."""
        holders = {c.files[t.file].digest for c in self.components.values() for t in c.tensors.values()}
        others = {e.digest: e.size_bytes for _, e in self.entries() if e.digest not in holders}
        return self.weights_bytes + sum(others.values())


@dataclass(frozen=True)
class Artifact:
    """A manifest and the place where its blobs lie. Weights are mapped when asked for, never loaded."""

    manifest: Manifest
    blobs: Path

    @property
    def digest(self) -> str:
        return self.manifest.digest()

    @property
    def format(self) -> str:
        return self.manifest.format

    @property
    def interface(self) -> Interface:
        return self.manifest.interface

    @property
    def component(self) -> Component:
        """The only component.

        Raises: PipelineError where the artifact has several.
        """
        if len(self.manifest.components) != 1:
            raise PipelineError(f"the artifact has {len(self.manifest.components)} components; name the one you want")
        return next(iter(self.manifest.components.values()))

    def locate(self, entry: FileEntry) -> Path:
        """The file that holds the bytes of `entry`."""
        return Path(entry.path) if entry.path else blob_path(self.blobs, entry.digest)

    def file(self, name: str) -> Path | None:
        """Path of the file `name`, shared or of a component; None where there is none."""
        entry = self.manifest.files.get(name)
        if entry is None:
            for component in self.manifest.components.values():
                entry = entry or component.files.get(name)
        return self.locate(entry) if entry else None

    def read_json(self, name: str) -> dict[str, Any]:
        """The shared file `name` as JSON; an empty dict where it is not there."""
        path = self.file(name)
        return json.loads(path.read_text(encoding="utf-8")) if path else {}

    def tensor(self, name: str, component: str = MAIN_COMPONENT) -> np.ndarray:
        """Map the tensor `name`: a read-only array over the file's pages.

        Raises: KeyError where there is no such tensor.
        """
        part = self.manifest.components[component]
        ref = part.tensors[name]
        return map_tensor(self.locate(part.files[ref.file]), ref)


def blob_path(blobs: Path, digest: str) -> Path:
    return blobs / digest[:2] / digest


def numpy_dtype(name: str) -> np.dtype:
    """numpy's data type of that name, those of ml_dtypes (bfloat16, float8_e4m3fn …) among them."""
    import numpy as np

    try:
        return np.dtype(name)
    except TypeError:
        import ml_dtypes

        dtype: np.dtype = np.dtype(getattr(ml_dtypes, name))
        return dtype


def map_tensor(path: Path, ref: TensorRef) -> np.ndarray:
    """A read-only array over the bytes of `ref` in the file at `path`; nothing is read before it is used."""
    import numpy as np

    dtype = numpy_dtype(ref.dtype)
    if ref.length == 0:
        return np.empty(ref.shape, dtype)
    # np.memmap maps from the page boundary below an offset, so any offset will do; unaligned views work on x86 and ARM
    raw = np.memmap(path, dtype=np.uint8, mode="r", offset=ref.offset, shape=(ref.length,))
    return np.asarray(raw.view(dtype) if ref.offset % dtype.itemsize == 0 else np.frombuffer(raw, dtype)).reshape(
        ref.shape
    )


def canonical_json(value: Any) -> bytes:
    """The one JSON text of a value: sorted keys, no spaces, UTF-8.

    Raises: ValueError for NaN and infinity, TypeError for what JSON cannot hold.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
