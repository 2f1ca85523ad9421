"""The store: immutable blobs named by SHA-256, artifacts that name blobs, and the index from stage keys to artifacts.

blobs/ab/<sha256>              contents, read-only, one hard link each
artifacts/ab/<digest>.json     manifests
stages/ab/<stage key>.json     what a stage yielded, what went into its key, and what it cost
content/<own part>/<inputs>    the same artifact, found by the contents of its inputs
references/ab/<sha256>.json    where files of the user's with that digest were seen
digests/                       digests of files by their identity
measurements/                  results that do not depend on the clock: quality, effects
logs/<stage key>.log           what the pass printed
locks/  tmp/                   one lock a key; work in progress, swept when its owner is gone
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import Field, ValidationError

from pipeline.artifact import Artifact, FileEntry, Frozen, Manifest, blob_path
from pipeline.errors import HostError, StageError
from pipeline.files import DigestMemory, fsync_folder, write_atomically


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


class Store:
    """Blobs, artifacts and their index under one folder. Any number of processes may share it."""

    def __init__(self, root: Path) -> None:
        if root.exists() and not root.is_dir():
            raise HostError(f"the store {root} is not a folder", hint="set PIPELINE_STORE to one that can be written")
        self.root = root
        self.blobs = root / "blobs"
        self._digests = DigestMemory(root / "digests")

    # Files that are not ours

    def digest_file(self, path: Path) -> str:
        """SHA-256 of any file; read once for as long as it does not change."""
        return self._digests.digest(path)

    def reference(self, path: Path) -> FileEntry:
        """An entry for a file of the user's, which stays where it is. Symbolic links are followed."""
        path = path.resolve(strict=True)
        stat = path.stat()
        digest = self.digest_file(path)
        seen = self._shard("references", digest)
        known = self._read(seen) or []
        if str(path) not in known:
            write_atomically(seen, json.dumps([*known, str(path)][-8:]).encode())
        return FileEntry(digest=digest, size_bytes=stat.st_size, path=str(path), mtime_ns=stat.st_mtime_ns)

    def _find_reference(self, entry: FileEntry) -> FileEntry | None:
        """`entry` with a path where its contents are today: its own, else another where they were seen."""
        others = self._read(self._shard("references", entry.digest)) or []
        for candidate in dict.fromkeys([entry.path, *others]):
            path = Path(str(candidate))
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

    # Artifacts

    def artifact(self, digest: str) -> Artifact | None:
        """The artifact of that digest; None where it, or a file that it needs, is missing or has changed.

        A blob's bytes are read again only where its size or its time of modification is not what it was.
        """
        data = self._read(self._shard("artifacts", digest))
        if data is None:
            return None
        try:
            manifest = Manifest.model_validate(data)
        except ValidationError:  # written by another version of the schema, or damaged
            return None
        moved: dict[str, FileEntry] = {}
        for _, entry in manifest.entries():
            if entry.path:
                found = self._find_reference(entry)
                if found is None:
                    return None
                if found != entry:
                    moved[entry.digest] = found
            elif not self._is_whole(entry):
                return None
        return Artifact(_relocate(manifest, moved) if moved else manifest, self.blobs)

    def _is_whole(self, entry: FileEntry) -> bool:
        """True where the entry's file is there with its size, and a referenced one with its contents."""
        if entry.path:
            return self._find_reference(entry) is not None
        blob = blob_path(self.blobs, entry.digest)
        try:
            return blob.stat().st_size == entry.size_bytes and self.digest_file(blob) == entry.digest
        except OSError:
            return False

    def publish(self, staging: Path, manifest: Manifest) -> Artifact:
        """Move the blobs staged in `staging` into the store, then write the manifest.

        Nothing names a blob before it is complete and durable, so a kill at any point leaves no half artifact.

        Raises: StageError where the manifest names a file that is nowhere, or that changed meanwhile.
        """
        staged = staging / "blobs"
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
            if not self._is_whole(entry):
                place = entry.path or "the store"
                raise StageError(f"the artifact names {name}, which is not in {place} as the artifact describes it")
        digest = manifest.digest()
        write_atomically(self._shard("artifacts", digest), manifest.model_dump_json(indent=1).encode())
        return Artifact(manifest, self.blobs)

    # The index

    def stage_record(self, key: str) -> StageRecord | None:
        """The record under `key`, if its artifact is still whole."""
        record = self._record(self._shard("stages", key))
        return record if record and self.artifact(record.artifact) else None

    def record_by_content(self, own: str, inputs: str) -> StageRecord | None:
        """A record whose stage did the same to inputs of the same contents, whatever their history."""
        pointer = self._read(self.root / "content" / own / f"{inputs}.json")
        return self.stage_record(str(pointer["key"])) if pointer else None

    def may_hit(self, own: str) -> bool:
        """True where some stage with the same own part has run, on whatever input."""
        folder = self.root / "content" / own
        return folder.is_dir() and any(folder.iterdir())

    def put_record(self, record: StageRecord, *, own: str, inputs: str) -> None:
        """Index an artifact under its stage key and under its contents."""
        write_atomically(self._shard("stages", record.key), record.model_dump_json(indent=1).encode())
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
        found: dict[str, Any] | None = self._read(self._shard("measurements", key))
        return found

    def put_measurement(self, key: str, result: dict[str, Any]) -> None:
        write_atomically(self._shard("measurements", key), json.dumps(result).encode())

    # Work in progress

    def log_path(self, key: str) -> Path:
        folder = self.root / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{key}.log"

    @contextmanager
    def lock(self, key: str) -> Iterator[None]:
        """Hold the lock of `key`; the kernel gives it back when its holder dies."""
        folder = self.root / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{key}.lock"):
            yield

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """A folder for work in progress, on the store's file system; gone afterwards, whatever happens."""
        tmp = self.root / "tmp"
        tmp.mkdir(parents=True, exist_ok=True)
        self._sweep(tmp)
        name = secrets.token_hex(8)
        guard = FileLock(tmp / f"{name}.lock")
        with guard:  # taken before the folder exists: a folder whose lock is free has no owner
            folder = tmp / name
            folder.mkdir()
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
                (tmp / f"{name}.lock").unlink(missing_ok=True)

    def _sweep(self, tmp: Path) -> None:
        for folder in [p for p in tmp.iterdir() if p.is_dir()]:
            lock = tmp / f"{folder.name}.lock"
            try:
                with FileLock(lock, timeout=0):
                    shutil.rmtree(folder, ignore_errors=True)
                    lock.unlink(missing_ok=True)
            except Timeout:  # its owner is at work
                continue

    # Paths

    def _shard(self, room: str, digest: str) -> Path:
        return self.root / room / digest[:2] / f"{digest}.json"

    @staticmethod
    def _read(path: Path) -> Any:
        try:
            return json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError:  # damaged: as good as missing, it will be made again
            return None


def _relocate(manifest: Manifest, moved: dict[str, FileEntry]) -> Manifest:
    def swap(files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        return {name: moved.get(entry.digest, entry) if entry.path else entry for name, entry in files.items()}

    components = {
        part: component.model_copy(update={"files": swap(component.files)})
        for part, component in manifest.components.items()
    }
    return manifest.model_copy(update={"files": swap(manifest.files), "components": components})
