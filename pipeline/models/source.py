"""The untouched model: found, checked, and described as an artifact that references the files where they lie."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipeline.artifact import MAIN_COMPONENT, Artifact, Component, FileEntry, Interface, Manifest
from pipeline.errors import RecipeError, did_you_mean
from pipeline.models.architecture import check_architecture
from pipeline.models.checkpoint import (
    COMPANIONS,
    check_code_files,
    check_index,
    check_weights,
    code_files,
    max_length,
    read_config,
    read_weights,
    resolve_dtype,
    weight_files,
)
from pipeline.models.hub import hub_snapshot
from pipeline.models.onnx_file import GENAI_CONFIG, onnx_artifact, read_onnx_file
from pipeline.store import Store

BUILTIN = Path(__file__).parent / "builtin"
TOKENIZER = "tokenizer.json"
"""What quality is measured with."""

TORCH_READERS = ("source.py", "checkpoint.py", "safetensors.py")
READERS = {
    "onnx": ("source.py", "onnx_file.py", "onnx_header.py", "checkpoint.py"),
    "architecture": (
        "random_weights.py",
        "outlier_channels.py",
        "architecture.py",
        "checkpoint.py",
        "safetensors.py",
    ),
}
"""Modules beside this one that write the manifest of a source's artifact."""

Kind = Literal["builtin", "path", "huggingface", "onnx", "architecture"]


@dataclass(frozen=True)
class Source:
    """A model that was found: its folder and its files by name."""

    kind: Kind
    name: str
    folder: Path
    dtype: str
    files: tuple[str, ...]
    """Relative to `folder`; none where the weights are drawn from a seed."""
    max_length: int | None
    revision: str | None = None
    format: Literal["torch", "onnx"] = "torch"
    weights: tuple[str, ...] = ()
    """Those of `files` that hold weights."""
    graph: str | None = None
    """The ONNX file among `files`."""
    architecture: dict[str, Any] | None = field(default=None)
    """type, seed, the configuration's fields and perhaps outlier_channels, where weights are drawn from a seed."""
    trust_remote_code: bool = False

    def __str__(self) -> str:
        at = f" at {self.revision}" if self.revision else ""
        return f"{self.kind}: {self.name}{at}"

    @property
    def weights_bytes(self) -> int:
        """Bytes of the files that hold weights; 0 where they are yet to be drawn."""
        return sum((self.folder / name).stat().st_size for name in self.weights)

    @property
    def has_tokenizer(self) -> bool:
        return TOKENIZER in self.files


def reading_digest(source: Source) -> str:
    """SHA-256 of the sources that write the artifact's manifest: a mend there changes what the model's files mean."""
    names = READERS.get(source.kind, TORCH_READERS)
    return hashlib.sha256(b"".join((Path(__file__).parent / name).read_bytes() for name in names)).hexdigest()


def builtin_names() -> list[str]:
    """The models that ship with the package."""
    return sorted(p.parent.name for p in BUILTIN.glob("*/config.json"))


def evaluation_text(name: str = "llama2-tiny") -> Path:
    """The held-out text that ships with the package: no built-in model was trained on it."""
    return BUILTIN / name / "held_out.txt"


def calibration_text(name: str = "llama2-tiny") -> Path:
    """Text to calibrate with; it shares no document with the held-out text."""
    return BUILTIN / name / "calibration.txt"


def find_source(
    kind: Kind,
    name: str,
    *,
    relative_to: Path,
    revision: str | None = None,
    dtype: str = "auto",
    download: bool = True,
    trust_remote_code: bool = False,
    architecture: dict[str, Any] | None = None,
) -> Source:
    """Find a model's files.

    `relative_to` is the folder that a relative `path` or `onnx` starts from. `download` allows the hub's files to be
    fetched; without it only those already in the hub's cache are found. `architecture` holds type, seed, perhaps
    outlier_channels, and the configuration's fields where `kind` says so.

    Raises: RecipeError where there is no such model or it is not usable; HostError where it cannot be fetched.
    """
    if kind == "onnx":
        return _onnx_source(name, relative_to)
    if kind == "architecture":
        return _architecture_source(name, dict(architecture or {}), dtype)
    if kind == "builtin":
        if name not in builtin_names():
            raise RecipeError(
                f"unknown built-in model {name!r}", hint=did_you_mean(name, builtin_names(), noun="built-in models")
            )
        folder = BUILTIN / name
    elif kind == "path":
        folder = (relative_to / Path(name).expanduser()).resolve()
        if not folder.is_dir():
            what = "is a file, not a folder" if folder.exists() else "does not exist"
            onnx = folder.suffix == ".onnx" and folder.exists()
            hint = "an ONNX file is given as model: {onnx: FILE}" if onnx else None
            raise RecipeError(
                f"model path {folder} {what}", hint=hint or "give the folder that holds config.json and weights"
            )
    else:
        folder = hub_snapshot(name, revision, download=download, trust_remote_code=trust_remote_code)
        revision = folder.name
    config = read_config(folder, trust_remote_code=trust_remote_code)
    weights = weight_files(folder)
    tensors = read_weights(folder, weights)
    check_index(folder, tensors)
    check_weights(folder, config, tensors)
    companions = [name for name in COMPANIONS if (folder / name).is_file()]
    code: list[str] = []
    if trust_remote_code:
        check_code_files(folder, config)
        code = code_files(folder)
    return Source(
        kind=kind,
        name=name,
        folder=folder,
        dtype=resolve_dtype(dtype, config, tensors),
        files=(*companions, *code, *weights),
        max_length=max_length(config),
        revision=revision if kind == "huggingface" else None,
        weights=tuple(weights),
        trust_remote_code=trust_remote_code,
    )


def source_artifact(source: Source, store: Store) -> Artifact:
    """The model as an artifact. Nothing is copied.

    Raises: RecipeError where config and weights do not fit together, or a weight file is damaged; ValueError for an
    architecture, whose weights a worker has to draw.
    """
    if source.architecture is not None:
        raise ValueError(f"the weights of {source} are yet to be drawn")
    if source.graph is not None:
        companions = {Path(name).name: source.folder / name for name in source.files if _is_companion(name)}
        return onnx_artifact(read_onnx_file(source.folder / source.graph, companions), companions, store)
    config = read_config(source.folder, trust_remote_code=source.trust_remote_code)
    entries = {name: store.reference(source.folder / name) for name in source.files}
    tensors = read_weights(source.folder, list(source.weights))
    text = config.get("text_config", config)
    execution: dict[str, Any] = {"dtype": source.dtype}
    if source.trust_remote_code:
        execution["trust_remote_code"] = True
    manifest = Manifest(
        format="torch",
        components={MAIN_COMPONENT: Component(format="torch", files=_pick(entries, source, True), tensors=tensors)},
        files=_pick(entries, source, False),
        interface=Interface(task="causal-lm", vocab_size=text.get("vocab_size"), max_length=max_length(config)),
        execution=execution,
    )
    return Artifact(manifest, store.blobs)


def _pick(entries: dict[str, FileEntry], source: Source, weights: bool) -> dict[str, FileEntry]:
    return {name: entry for name, entry in entries.items() if (name in source.weights) == weights}


def _onnx_source(name: str, relative_to: Path) -> Source:
    given = relative_to / Path(name).expanduser()
    path = given.parent.resolve() / given.name  # the file itself may be a link: its data files lie beside it
    if not path.is_file():
        if path.is_dir():
            graphs = sorted(p.name for p in path.glob("*.onnx"))
            hint = f"give one of its files: {', '.join(graphs[:5])}" if graphs else "give the .onnx file"
            raise RecipeError(f"{path} is a folder", hint=hint)
        raise RecipeError(f"there is no file {path}", hint="give the .onnx file of a model, relative to the recipe")
    home = _companions_folder(path)
    names = [file for file in (*COMPANIONS, GENAI_CONFIG) if (home / file).is_file()]
    found = read_onnx_file(path, {file: home / file for file in names})
    graph = str(path.relative_to(home))
    data = [_below(file, home) for file in found.data_files]
    return Source(
        kind="onnx",
        name=name,
        folder=home,
        dtype=found.interface.cache.dtype if found.interface.cache else "float32",
        files=(*names, graph, *data),
        max_length=found.interface.max_length,
        format="onnx",
        weights=(graph, *data),
        graph=graph,
    )


def _companions_folder(path: Path) -> Path:
    """The graph's folder, or the one above where the graph stands alone in its own, as in MODEL/onnx/model.onnx."""
    for folder in (path.parent, path.parent.parent):
        if any((folder / name).is_file() for name in ("config.json", GENAI_CONFIG, TOKENIZER)):
            return folder
    return path.parent


def _below(file: Path, home: Path) -> str:
    """The data file's name from `home`; one that a link leads to elsewhere keeps its whole path."""
    for folder in (home, home.resolve()):
        if file.is_relative_to(folder):
            return str(file.relative_to(folder))
    return str(file)


def _is_companion(name: str) -> bool:
    return Path(name).name in (*COMPANIONS, GENAI_CONFIG)


def _architecture_source(kind: str, given: dict[str, Any], dtype: str) -> Source:
    outliers = given.get("outlier_channels")
    config = {name: value for name, value in given.items() if name not in ("type", "seed", "outlier_channels")}
    check_architecture(kind, config, outliers=outliers is not None)
    architecture = {"type": kind, "seed": int(given.get("seed", 0)), "config": config}
    if outliers is not None:
        architecture["outlier_channels"] = dict(outliers)
    return Source(
        kind="architecture",
        name=kind,
        folder=Path(),
        dtype="float32" if dtype == "auto" else dtype,
        files=(),
        max_length=max_length(config),
        architecture=architecture,
    )
