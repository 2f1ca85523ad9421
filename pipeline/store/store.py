"""The store: immutable blobs named by SHA-256, artifacts that name blobs, and the index from stage keys to artifacts.

blobs/ab/<sha256>              contents, read-only, one hard link each
artifacts/ab/<digest>.json     manifests
stages/ab/<stage key>.json     what a stage yielded, what went into its key, and what it cost
content/<own part>/<inputs>    the same artifact, found by the contents of its inputs
references/ab/<sha256>.json    where files of the user's with that digest were seen
digests/                       digests of files by their identity
measurements/                  results that do not depend on the clock: quality, effects
logs/<stage key>.log           what the pass printed
runs/  pins/  leases/          what makes artifacts worth keeping; what running processes use
locks/  tmp/                   one lock a key; work in progress, swept when its owner is gone
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from pipeline.artifact import Artifact, FileEntry, Frozen, Manifest, blob_path
from pipeline.errors import HostError, StageError
from pipeline.files import DigestMemory, fsync_folder, write_atomically
from pipeline.store.leases import Lease, gate, open_lease
from pipeline.store.locks import lock, remove_if_free
from pipeline.store.writer import BLOBS


def default_store_path() -> Path:
    """`$PIPELINE_STORE`, else `pipeline` in the user's cache folder."""
    if given := os.environ.get("PIPELINE_STORE"):
        return Path(given).expanduser().absolute()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser().absolute() / "pipeline"


class StageRecord(Frozen):
    """What running a stage yielded."""

    key: str
    artifact: str = Field(description="digest of the artifact")
    recipe: str
    stage: str
    pass_name: str
    ingredients: dict[str, Any] = Field(description="what the key was computed over, for `why`")
    created: str = Field(description="UTC, ISO 8601")
    wall_s: float | None = None
    peak_memory_bytes: int | None = None
    peak_rss_bytes: int | None = None
    rules: dict[str, tuple[int, int]] = Field(
        default_factory=dict, description="what the pass told of its rules: done, of"
    )


class Store:
    """Blobs, artifacts and their index under one folder. Any number of processes may share it."""

    def __init__(self, root: Path) -> None:
        if root.exists() and not root.is_dir():
            raise HostError(f"the store {root} is not a folder", hint="set PIPELINE_STORE to one that can be written")
        self.root = root
        self.blobs = root / "blobs"
        self._digests = DigestMemory(root / "digests")
        self._lease: Lease | None = None

    # Files that are not ours

    def digest_file(self, path: Path) -> str:
        """SHA-256 of any file; read once for as long as it does not change."""
        return self._digests.digest(path)

    def forget_digest(self, path: Path) -> None:
        """Have the file's bytes read when its digest is next asked for."""
        self._digests.forget(path)

    def reference(self, path: Path) -> FileEntry:
        """An entry for a file of the user's, which stays where it is. Symbolic links are followed."""
        path = path.resolve(strict=True)
        stat = path.stat()
        digest = self.digest_file(path)
        known = self._places_seen(digest)
        if str(path) not in known:
            with suppress(OSError):  # a full disk, or a store that may only be read: it is not found if it is moved
                write_atomically(self.place("references", digest), json.dumps([*known, str(path)][-8:]).encode())
        return FileEntry(digest=digest, size_bytes=stat.st_size, path=str(path), mtime_ns=stat.st_mtime_ns)

    def find_reference(self, entry: FileEntry) -> FileEntry | None:
        """`entry` with a path where its contents are today: its own, else another where they were seen."""
        for candidate in dict.fromkeys([str(entry.path), *self._places_seen(entry.digest)]):
            path = Path(candidate)
            try:
                stat = path.stat()
                if stat.st_size != entry.size_bytes:
                    continue
                same = candidate == entry.path and stat.st_mtime_ns == entry.mtime_ns
                if same or self.digest_file(path) == entry.digest:
                    return entry.model_copy(update={"path": str(path), "mtime_ns": stat.st_mtime_ns})
            except OSError:  # gone or unreadable: try the next place
                continue
        return None

    def _places_seen(self, digest: str) -> list[str]:
        known = self._read(self.place("references", digest))
        return [str(place) for place in known] if isinstance(known, list) else []

    # Artifacts

    def artifact(self, digest: str) -> Artifact | None:
        """The artifact of that digest; None where it, or a file that it needs, is missing or has changed.

        A blob's bytes are read again only where its size or its time of modification is not what it was.
        """
        found = self.examine(digest)
        return found if isinstance(found, Artifact) else None

    def examine(self, digest: str) -> Artifact | str:
        """The artifact of that digest, else what is wrong with it, in words."""
        with gate(self.root) if self._lease else nullcontext():
            found = self._examine(digest)
            if self._lease and isinstance(found, Artifact):
                self._lease.add(digest)
        return found

    def _examine(self, digest: str) -> Artifact | str:
        path = self.place("artifacts", digest)
        data = self._read(path)
        if data is None:
            return f"its manifest is {'damaged' if path.exists() else 'missing'}"
        try:
            manifest = Manifest.model_validate(data)
        except ValidationError:
            return "its manifest is damaged, or was written by another version"
        if manifest.digest() != digest:
            return "its manifest was changed"
        moved: dict[str, FileEntry] = {}
        for name, entry in manifest.entries():
            if entry.path is None:
                if fault := self._blob_fault(entry):
                    return f"the blob of {name.replace(entry.digest, entry.digest[:12])} {fault}"
                continue
            found = self.find_reference(entry)
            if found is None:
                return f"{name} refers to {entry.path}, which was changed, moved or removed"
            if found != entry:
                moved[entry.digest] = found
        return Artifact(_relocate(manifest, moved) if moved else manifest, self.blobs)

    def _blob_fault(self, entry: FileEntry) -> str | None:
        """What is wrong with a blob: missing, cut, or other bytes; None where it is whole."""
        blob = blob_path(self.blobs, entry.digest)
        try:
            size = blob.stat().st_size
            if size != entry.size_bytes:
                return f"has {size} bytes instead of {entry.size_bytes}"
            return None if self.digest_file(blob) == entry.digest else "has other bytes than it was stored with"
        except FileNotFoundError:
            return "is missing"
        except OSError as error:
            return f"cannot be read: {error.strerror}"

    def publish(self, staging: Path, manifest: Manifest) -> Artifact:
        """Move the blobs staged in `staging` into the store, then write the manifest.

        Nothing names a blob before it is complete and durable, so a kill at any point leaves no half artifact.

        Raises: StageError where the manifest names a file that is nowhere, or that changed meanwhile.
        """
        with gate(self.root):
            artifact = self._publish(staging, manifest)
            if self._lease:
                self._lease.add(artifact.digest)
        return artifact

    def _publish(self, staging: Path, manifest: Manifest) -> Artifact:
        staged = staging / BLOBS
        for source in sorted(staged.iterdir()) if staged.is_dir() else []:
            if source.name.startswith("."):  # a stream that the pass left open
                continue
            target = blob_path(self.blobs, source.name)
            if target.exists() and self.digest_file(target) == source.name:
                source.unlink()
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            source.chmod(0o444)
            source.replace(target)
            fsync_folder(target.parent)
            self._digests.remember(target, target.name)
        for name, entry in manifest.entries():
            if self.find_reference(entry) is None if entry.path else self._blob_fault(entry):
                place = entry.path or "the store"
                raise StageError(f"the artifact names {name}, which is not in {place} as the artifact describes it")
        digest = manifest.digest()
        write_atomically(self.place("artifacts", digest), manifest.model_dump_json(indent=1).encode())
        return Artifact(manifest, self.blobs)

    # The index

    def stage_record(self, key: str) -> StageRecord | None:
        """The record under `key`, if its artifact is still whole."""
        record = self._record(self.place("stages", key))
        return record if record and self.artifact(record.artifact) else None

    def damage(self, key: str) -> str | None:
        """What is wrong with what the store has under `key`, in words; None where it is whole or was never there."""
        path = self.place("stages", key)
        if not path.exists():
            return None
        record = self._record(path)
        if record is None:
            return "its record is damaged, or was written by another version"
        found = self.examine(record.artifact)
        return found if isinstance(found, str) else None

    def touch(self, key: str) -> None:
        """Note that what is under `key` was used now; `pipeline cache gc --older-than` counts from there."""
        _mark_used(self.place("stages", key))

    def record_by_content(self, own: str, inputs: str) -> StageRecord | None:
        """A record whose stage did the same to inputs of the same contents, whatever their history."""
        pointer = self._read(self.root / "content" / own / f"{inputs}.json")
        return self.stage_record(str(pointer["key"])) if isinstance(pointer, dict) and "key" in pointer else None

    def may_hit(self, own: str) -> bool:
        """True where some stage with the same own part has run, on whatever input."""
        folder = self.root / "content" / own
        return folder.is_dir() and any(folder.iterdir())

    def put_record(self, record: StageRecord, *, own: str, inputs: str) -> None:
        """Index an artifact under its stage key and under its contents."""
        write_atomically(self.place("stages", record.key), record.model_dump_json(indent=1).encode())
        pointer = json.dumps({"key": record.key}).encode()
        write_atomically(self.root / "content" / own / f"{inputs}.json", pointer)

    def records(self) -> Iterator[StageRecord]:
        """All readable records, the newest first."""
        paths = (self.root / "stages").glob("*/*.json")
        found = [r for p in paths if (r := self._record(p)) is not None]
        yield from sorted(found, key=lambda r: r.created, reverse=True)

    def _record(self, path: Path) -> StageRecord | None:
        data = self._read(path)
        try:
            return None if data is None else StageRecord.model_validate(data)
        except ValidationError:  # written by another version
            return None

    # Results that do not depend on the clock

    def measurement(self, key: str) -> dict[str, Any] | None:
        path = self.place("measurements", key)
        found = self._read(path)
        if not isinstance(found, dict):
            return None
        _mark_used(path)
        return found

    def put_measurement(self, key: str, result: dict[str, Any]) -> None:
        write_atomically(self.place("measurements", key), json.dumps(result).encode())

    # Work in progress

    def log_path(self, key: str) -> Path:
        folder = self.root / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{key}.log"

    @contextmanager
    def lease(self, folder: Path | None = None) -> Iterator[None]:
        """Until the end, garbage collection leaves alone what this process finds here or publishes.

        `folder` is the run's in the making: if this process dies, whoever next takes a lease removes it.
        """
        if self._lease is not None:  # a part of something larger that has one
            yield
            return
        self.sweep_staging()
        with open_lease(self.root, folder) as lease:
            self._lease = lease
            try:
                yield
            finally:
                self._lease = None

    @contextmanager
    def lock(self, key: str, *, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Hold the lock of `key`; the kernel gives it back when its holder dies. `on_wait`: another one holds it."""
        path = self.root / "locks" / f"{key}.lock"
        with lock(path, wait=False) as free:
            if free:
                yield
                return
        on_wait()
        with lock(path):
            yield

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """A folder for work in progress, on the store's file system; gone afterwards, whatever happens."""
        tmp = self.root / "tmp"
        self.sweep_staging()
        name = secrets.token_hex(8)
        with lock(tmp / f"{name}.lock"):  # taken before the folder exists: a folder whose lock is free has no owner
            folder = tmp / name
            folder.mkdir()
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
                (tmp / f"{name}.lock").unlink(missing_ok=True)

    def sweep_staging(self, *, dry_run: bool = False) -> int:
        """Remove what processes that died had not published; returns its bytes."""
        tmp = self.root / "tmp"
        freed = 0
        for path in sorted(tmp.iterdir()) if tmp.is_dir() else []:
            if path.suffix == ".lock":
                if not dry_run and not path.with_suffix("").exists():
                    remove_if_free(path)
                continue
            guard = path.with_name(f"{path.name}.lock")
            with lock(guard, wait=False) as dead:
                if not dead:  # its owner is at work
                    continue
                freed += sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
                if not dry_run:
                    shutil.rmtree(path, ignore_errors=True)
                    guard.unlink(missing_ok=True)
        return freed

    # Paths

    def place(self, room: str, digest: str) -> Path:
        """Where a room keeps what belongs to a digest or key."""
        return self.root / room / digest[:2] / f"{digest}.json"

    @staticmethod
    def _read(path: Path) -> Any:
        try:
            return json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError:  # damaged: as good as missing, it will be made again
            return None


def _mark_used(path: Path) -> None:
    """Set the time of modification, from which garbage collection counts."""
    with suppress(OSError):  # a store that may only be read, or another process removed it
        os.utime(path)


def _relocate(manifest: Manifest, moved: dict[str, FileEntry]) -> Manifest:
    def swap(files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        return {name: moved.get(entry.digest, entry) if entry.path else entry for name, entry in files.items()}

    components = {
        part: component.model_copy(update={"files": swap(component.files)})
        for part, component in manifest.components.items()
    }
    return manifest.model_copy(update={"files": swap(manifest.files), "components": components})
