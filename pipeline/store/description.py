"""One artifact of the store in all its parts, for people."""

from __future__ import annotations

from typing import Any

from pipeline.artifact import Artifact, CacheLayout, Frozen, Lineage, Manifest, blob_path
from pipeline.errors import RecipeError, did_you_mean
from pipeline.store.roots import pins, runs
from pipeline.store.store import StageRecord, Store

SHORTEST_PREFIX = 4


class FileFacts(Frozen):
    """One file of an artifact."""

    name: str
    size_bytes: int
    digest: str
    path: str
    referenced: bool


class TensorFacts(Frozen):
    """The tensors of a component of one data type."""

    dtype: str
    count: int
    bytes: int


class ComponentFacts(Frozen):
    name: str
    format: str
    files: tuple[FileFacts, ...]
    tensors: tuple[TensorFacts, ...]


class Description(Frozen):
    """All that the store knows of an artifact."""

    artifact: str
    problem: str | None
    format: str
    size_bytes: int
    weights_bytes: int
    components: tuple[ComponentFacts, ...]
    files: tuple[FileFacts, ...]
    task: str
    vocab_size: int | None
    max_length: int | None
    cache: CacheLayout | None
    inputs: dict[str, str]
    outputs: dict[str, str]
    transforms: tuple[dict[str, Any], ...]
    execution: dict[str, Any]
    lineage: Lineage | None
    records: tuple[StageRecord, ...]
    pinned: str | None
    runs: tuple[str, ...]


def find_artifact(store: Store, name: str) -> str:
    """The digest of the artifact that `name` means: the beginning of its digest or of a stage key, or RECIPE/STAGE.

    Of a RECIPE/STAGE the newest is meant.

    Raises: RecipeError where it means none, or more than one.
    """
    records = list(store.records())
    named = [r.artifact for r in records if f"{r.recipe}/{r.stage}" == name]
    if named:
        return named[0]
    if len(name) >= SHORTEST_PREFIX and all(c in "0123456789abcdef" for c in name):
        digests = {p.stem for p in (store.root / "artifacts").glob(f"{name[:2]}/{name}*.json")}
        digests |= {r.artifact for r in records if r.key.startswith(name)}
        if len(digests) == 1:
            return digests.pop()
        if digests:
            raise RecipeError(f"{name} begins several: {', '.join(sorted(d[:16] for d in digests))}")
    known = dict.fromkeys(f"{r.recipe}/{r.stage}" for r in records)
    hint = did_you_mean(name, known, noun="stages in the store") + "; or the beginning of an artifact's digest"
    raise RecipeError(f"the store has no artifact {name!r}", hint=hint)


def describe_artifact(store: Store, digest: str) -> Description:
    """Raises: RecipeError where its manifest is missing or cannot be read."""
    found = store.examine(digest)
    problem = found if isinstance(found, str) else None
    manifest = found.manifest if isinstance(found, Artifact) else _manifest(store, digest, str(problem))
    pin = pins(store).get(digest)
    return Description(
        artifact=digest,
        problem=problem,
        format=manifest.format,
        size_bytes=manifest.size_bytes,
        weights_bytes=manifest.weights_bytes,
        components=tuple(_component(store, manifest, name) for name in manifest.components),
        files=_files(store, manifest.files),
        task=manifest.interface.task,
        vocab_size=manifest.interface.vocab_size,
        max_length=manifest.interface.max_length,
        cache=manifest.interface.cache,
        inputs=manifest.interface.inputs,
        outputs=manifest.interface.outputs,
        transforms=manifest.transforms,
        execution=manifest.execution,
        lineage=manifest.lineage,
        records=tuple(r for r in store.records() if r.artifact == digest),
        pinned=None if pin is None else pin.note,
        runs=tuple(run.folder for run in runs(store) if run.exists and digest in run.artifacts.values()),
    )


def _manifest(store: Store, digest: str, problem: str) -> Manifest:
    try:
        return Manifest.model_validate_json(store.place("artifacts", digest).read_bytes())
    except (FileNotFoundError, ValueError):
        raise RecipeError(
            f"the artifact {digest[:12]} cannot be shown: {problem}",
            hint="`pipeline cache verify --delete` removes what is damaged; the next run makes it again",
        ) from None


def _component(store: Store, manifest: Manifest, name: str) -> ComponentFacts:
    component = manifest.components[name]
    by_dtype: dict[str, list[int]] = {}
    for tensor in component.tensors.values():
        by_dtype.setdefault(tensor.dtype, []).append(tensor.length)
    return ComponentFacts(
        name=name,
        format=component.format,
        files=_files(store, component.files),
        tensors=tuple(TensorFacts(dtype=d, count=len(n), bytes=sum(n)) for d, n in sorted(by_dtype.items())),
    )


def _files(store: Store, files: dict[str, Any]) -> tuple[FileFacts, ...]:
    return tuple(
        FileFacts(
            name=name,
            size_bytes=entry.size_bytes,
            digest=entry.digest,
            path=entry.path or str(blob_path(store.blobs, entry.digest)),
            referenced=entry.path is not None,
        )
        for name, entry in files.items()
    )
