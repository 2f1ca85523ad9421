"""Verification: every byte that the store holds or refers to, read again and compared with its digest."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from pipeline.artifact import FileEntry, Frozen, Manifest, blob_path
from pipeline.files import sha256_of
from pipeline.store.leases import gate
from pipeline.store.store import StageRecord, Store

DIGEST_NAME = re.compile(r"[0-9a-f]{64}")

Fault = Literal["missing", "cut", "changed", "unreadable"]
Kind = Literal["blob", "file outside", "manifest", "record"]


class Damage(Frozen):
    """One file that is not what it was."""

    kind: Kind
    path: str
    fault: Fault
    detail: str
    artifacts: tuple[str, ...] = Field((), description="digests of those that need it")
    stages: tuple[str, ...] = Field((), description="RECIPE/STAGE of those that need it")


class Verification(Frozen):
    """What was read, and what was wrong with it."""

    artifacts: int
    files: int
    bytes_read: int
    damages: tuple[Damage, ...] = ()
    deleted: int = Field(0, description="files of the store that were deleted")


def verify_store(
    store: Store, *, delete: bool = False, on_progress: Callable[[str], None] = lambda what: None
) -> Verification:
    """Read every blob, referenced file, manifest and record.

    What is damaged is not trusted by any run from then on, whatever its time of modification says: a stage that needs
    it is made again. With `delete` it is removed from the store, with the artifacts and records that need it, pinned
    ones and those in use, too; what was mended while this read stays, and files outside the store are never touched.
    """
    check = _Check(store, on_progress)
    check.records()
    check.manifests()
    check.files()
    deleted = check.delete() if delete and check.damages else 0
    return Verification(
        artifacts=check.artifacts,
        files=check.count,
        bytes_read=check.bytes_read,
        damages=tuple(check.damages),
        deleted=deleted,
    )


class _Check:
    def __init__(self, store: Store, on_progress: Callable[[str], None]) -> None:
        self.store = store
        self.on_progress = on_progress
        self.damages: list[Damage] = []
        self.stages: dict[str, set[str]] = defaultdict(set)  # artifact -> RECIPE/STAGE
        self.keys: dict[str, set[Path]] = defaultdict(set)  # artifact -> its records
        self.users: dict[tuple[str, str | None], set[str]] = defaultdict(set)  # (digest, path) -> artifacts
        self.entries: dict[tuple[str, str | None], FileEntry] = {}
        self.faulty: dict[Path, tuple[str, str | None]] = {}  # what was found damaged, by the path that is told
        self.artifacts = self.count = self.bytes_read = 0

    def records(self) -> None:
        for path in _json_files(self.store.root / "stages"):
            try:
                record = StageRecord.model_validate_json(path.read_bytes())
            except FileNotFoundError:  # collected meanwhile
                continue
            except ValidationError as error:
                self._damaged("record", path, "unreadable", error.errors()[0]["msg"], ())
                continue
            self.stages[record.artifact].add(f"{record.recipe}/{record.stage}")
            self.keys[record.artifact].add(path)

    def manifests(self) -> None:
        for path in _json_files(self.store.root / "artifacts"):
            try:
                manifest = Manifest.model_validate_json(path.read_bytes())
            except FileNotFoundError:
                continue
            except ValidationError as error:
                self._damaged("manifest", path, "unreadable", error.errors()[0]["msg"], {path.stem})
                continue
            self.artifacts += 1
            if manifest.digest() != path.stem:
                self._damaged("manifest", path, "changed", "its contents have another digest", {path.stem})
            for _, entry in manifest.entries():
                self.users[entry.digest, entry.path].add(path.stem)
                self.entries[entry.digest, entry.path] = entry
        for artifact in self.keys:
            path = self.store.place("artifacts", artifact)
            if not path.exists() and any(record.exists() for record in self.keys[artifact]):
                self._damaged("manifest", path, "missing", "records name it", {artifact})

    def files(self) -> None:
        for (digest, outside), users in sorted(self.users.items(), key=lambda item: str(item[0])):
            entry = self.entries[digest, outside]
            path = Path(entry.path) if entry.path else blob_path(self.store.blobs, digest)
            self.on_progress(str(path))
            fault = self._fault(entry)
            if fault is None:
                continue
            if not any(self.store.place("artifacts", user).exists() for user in users):
                continue  # collected meanwhile
            self.faulty[path] = (digest, outside)
            self._damaged("file outside" if outside else "blob", path, *fault, users)
        self._unnamed()

    def _unnamed(self) -> None:
        """Blobs that no manifest names: nothing depends on them, but a pass that makes the same bytes would."""
        for path in self.store.blobs.glob("*/*"):
            if (path.name, None) in self.users or not DIGEST_NAME.fullmatch(path.name) or not path.is_file():
                continue
            entry = FileEntry(digest=path.name, size_bytes=path.stat().st_size)
            if fault := self._read(path, entry):
                self.faulty[path] = (path.name, None)
                self.entries[path.name, None] = entry
                self._damaged("blob", path, *fault, ())

    def _fault(self, entry: FileEntry) -> tuple[Fault, str] | None:
        """What is wrong with the file that the store takes for `entry`: its blob, or where its contents are today."""
        if entry.path is None:
            return self._read(blob_path(self.store.blobs, entry.digest), entry)
        read = None
        while (found := self.store.find_reference(entry)) is not None:
            fault = self._read(Path(found.path or ""), entry)
            if fault is None or found == read:  # still trusted for its time of modification, with other bytes
                return fault
            read = found  # its digest was forgotten: the store now looks at its bytes, then elsewhere
        return self._read(Path(entry.path), entry)

    def _read(self, path: Path, entry: FileEntry) -> tuple[Fault, str] | None:
        self.count += 1
        try:
            size = path.stat().st_size
            if size != entry.size_bytes:
                return "cut" if size < entry.size_bytes else "changed", f"{size} bytes instead of {entry.size_bytes}"
            self.bytes_read += size
            if sha256_of(path) == entry.digest:
                return None
            self.store.forget_digest(path)  # what is remembered of it is wrong, whatever its time says
            return "changed", "other bytes than it was stored with"
        except FileNotFoundError:
            return "missing", "no such file"
        except OSError as error:
            return "unreadable", str(error.strerror)

    def delete(self) -> int:
        """Remove what is damaged inside the store, and the manifests and records that need it.

        Reading took a while, and a run may have made something again meanwhile: all is looked at anew while nobody
        can publish.
        """
        with gate(self.store.root, alone=True):
            damages = [damage for damage in self.damages if self._is_still(damage)]
            faulty = {self.faulty[path] for d in damages if (path := Path(d.path)) in self.faulty}
            doomed = {Path(damage.path) for damage in damages if damage.kind != "file outside"}
            for artifact in {artifact for damage in damages for artifact in damage.artifacts}:
                path = self.store.place("artifacts", artifact)
                if not self._is_whole(path, faulty):
                    doomed |= {path, *(key for key in self.keys[artifact] if _names(key, artifact))}
            return sum(_unlink(path) for path in doomed)

    def _is_still(self, damage: Damage) -> bool:
        path = Path(damage.path)
        if path in self.faulty:
            entry = self.entries[self.faulty[path]]
            if damage.artifacts or path.exists():
                return self._fault(entry) is not None
            return False
        if damage.kind == "record":
            try:
                StageRecord.model_validate_json(path.read_bytes())
            except FileNotFoundError:
                return False
            except ValidationError:
                return True
            return False
        return not self._is_whole(path, set())

    def _is_whole(self, path: Path, faulty: set[tuple[str, str | None]]) -> bool:
        """Whether a manifest is what its name says, and needs nothing that is damaged."""
        try:
            manifest = Manifest.model_validate_json(path.read_bytes())
        except (FileNotFoundError, ValidationError):
            return False
        return manifest.digest() == path.stem and not any((e.digest, e.path) in faulty for _, e in manifest.entries())

    def _damaged(
        self, kind: Kind, path: Path, fault: Fault, detail: str, artifacts: set[str] | tuple[str, ...]
    ) -> None:
        stages = {stage for artifact in artifacts for stage in self.stages[artifact]}
        self.damages.append(
            Damage(
                kind=kind,
                path=str(path),
                fault=fault,
                detail=detail,
                artifacts=tuple(sorted(artifacts)),
                stages=tuple(sorted(stages)),
            )
        )


def _json_files(folder: Path) -> Iterator[Path]:
    yield from sorted(p for p in folder.glob("*/*.json") if not p.name.startswith("."))


def _names(path: Path, artifact: str) -> bool:
    """Whether a record still names that artifact: its stage may have been run again."""
    try:
        return StageRecord.model_validate_json(path.read_bytes()).artifact == artifact
    except (FileNotFoundError, ValidationError):
        return False


def _unlink(path: Path) -> bool:
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    return True
