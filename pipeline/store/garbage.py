"""Garbage collection: marks what finished runs, pins and running processes use, and sweeps the rest of the store."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import Field

from pipeline.artifact import Frozen
from pipeline.store.leases import gate, leased, sweep_leases
from pipeline.store.locks import lock, remove_if_free
from pipeline.store.roots import forget_run, pins, runs
from pipeline.store.store import Store

DAY_S = 24 * 60 * 60
REMEMBERED_DAYS = 90
"""Results and digests that nobody asked for in so long are forgotten; having them again costs time and nothing else."""

KERNELS_DAYS = 30
"""Compiled kernels that no process took up in so long are removed; having them again costs a compilation."""

HALF_WRITTEN_S = 60 * 60
"""A file written aside and not renamed after so long has lost its writer."""

DIGEST = re.compile(rb"[0-9a-f]{64}")


class Removed(Frozen):
    """What was removed of one kind."""

    kind: str
    count: int
    bytes: int
    names: tuple[str, ...] = Field((), description="RECIPE/STAGE of artifacts, folders of runs")


class Collection(Frozen):
    """What a collection did, or would do."""

    dry_run: bool
    removed: tuple[Removed, ...]
    kept_artifacts: int
    kept_for: dict[str, int] = Field(description="artifacts by what keeps them; some have several reasons")

    @property
    def freed_bytes(self) -> int:
        return sum(part.bytes for part in self.removed)


def collect_garbage(
    store: Store, *, dry_run: bool = False, older_than_days: float = 0, keep_last: int | None = None
) -> Collection:
    """Remove what no finished run, pin or running process uses. Files of the user's are never touched.

    `older_than_days`: only artifacts that were neither made nor used for so long. `keep_last`: of every recipe, only
    the last so many runs keep their artifacts.

    Other processes wait while this works, and it waits for none but those that publish or look up an artifact just now.
    """
    with gate(store.root, alone=True):
        return _Sweep(store, dry_run).collect(older_than_days * DAY_S, keep_last)


class _Sweep:
    """One collection. The gate is held alone."""

    def __init__(self, store: Store, dry_run: bool) -> None:
        self.store = store
        self.root = store.root
        self.dry_run = dry_run
        self.now_s = time.time()
        self.counts: dict[str, int] = defaultdict(int)
        self.sizes: dict[str, int] = defaultdict(int)
        self.names: dict[str, list[str]] = defaultdict(list)

    def collect(self, young_s: float, keep_last: int | None) -> Collection:
        self._processes()
        roots = self._roots(keep_last)
        kept = self._artifacts(set().union(*roots.values()), young_s)
        self._blobs(kept)
        self._references(kept)
        self._locks()
        self._by_age()
        self._kernels()
        self._folders()
        kept_for = {why: len(digests & kept.keys()) for why, digests in roots.items()}
        kept_for["used lately"] = len(kept.keys() - set().union(*roots.values()))
        return Collection(
            dry_run=self.dry_run,
            removed=tuple(
                Removed(kind=kind, count=count, bytes=self.sizes[kind], names=tuple(self.names[kind]))
                for kind, count in self.counts.items()
            ),
            kept_artifacts=len(kept),
            kept_for={why: count for why, count in kept_for.items() if count},
        )

    def _processes(self) -> None:
        """What processes that died had not finished."""
        for folder in sweep_leases(self.root, dry_run=self.dry_run):
            self._note("unfinished runs", 0, str(folder))
        if freed := self.store.sweep_staging(dry_run=self.dry_run):
            self._note("unfinished work", freed)

    def _roots(self, keep_last: int | None) -> dict[str, set[str]]:
        """Digests of the artifacts to keep, by why."""
        marked: set[str] = set()
        seen: dict[str, int] = defaultdict(int)
        for run in runs(self.store):
            if not run.exists:
                self._note("records of deleted runs", 0)
                if not self.dry_run:
                    forget_run(self.store, run)
                continue
            seen[run.recipe] += 1
            if keep_last is None or seen[run.recipe] <= keep_last:
                marked |= set(run.artifacts.values())
        return {"runs": marked, "pins": set(pins(self.store)), "running processes": leased(self.root)}

    def _artifacts(self, marked: set[str], young_s: float) -> dict[str, bytes]:
        """Remove artifacts with what the index says of them; texts of the manifests that stay, by digest."""
        records = {path: _read(path) for path in (self.root / "stages").glob("*/*.json")}
        stages = defaultdict(list)
        for path, record in records.items():
            stages[str(record.get("artifact"))].append(path)
        kept: dict[str, bytes] = {}
        for path in sorted((self.root / "artifacts").glob("*/*.json")):
            last_used = max(_mtime(p) for p in [path, *stages[path.stem]])
            if path.stem in marked or self.now_s - last_used < young_s:
                kept[path.stem] = path.read_bytes()
                continue
            made_by = [f"{records[p].get('recipe')}/{records[p].get('stage')}" for p in stages[path.stem]]
            self._remove("artifacts", path, ", ".join(sorted(set(made_by))) or path.stem[:12])
        for digest, paths in stages.items():
            for path in paths if digest not in kept else []:
                self._remove("records of stages", path)
        keys = {path.stem for path, record in records.items() if record.get("artifact") in kept}
        for path in (self.root / "content").glob("*/*.json"):
            if _read(path).get("key") not in keys:
                self._remove("records of stages", path)
        for path in (self.root / "logs").glob("*.log"):
            if path.stem not in keys and self._is_free(self.root / "locks" / f"{path.stem}.lock"):
                self._remove("logs", path)
        return kept

    def _blobs(self, kept: dict[str, bytes]) -> None:
        # every digest that a manifest names, whatever version of the schema wrote it
        named = {digest.decode() for text in kept.values() for digest in DIGEST.findall(text)}
        for path in self.store.blobs.glob("*/*"):
            if path.name not in named:
                if not self.dry_run:
                    self.store.forget_digest(path)
                self._remove("blobs", path)

    def _references(self, kept: dict[str, bytes]) -> None:
        named = {digest.decode() for text in kept.values() for digest in DIGEST.findall(text)}
        for path in (self.root / "references").glob("*/*.json"):
            if path.stem not in named:
                self._remove("records of files outside", path)

    def _locks(self) -> None:
        """Lock files that nobody holds. Who opened one meanwhile notices that it has no name any more."""
        for path in (self.root / "locks").glob("*.lock"):
            if self._is_free(path):
                self._note("locks", 0)
                if not self.dry_run:
                    remove_if_free(path)

    def _by_age(self) -> None:
        for room in ("measurements", "digests"):
            self._older(room, (self.root / room).rglob("*"), REMEMBERED_DAYS * DAY_S)
        for room in ("artifacts", "stages", "content", "measurements", "digests", "references", "runs", "pins"):
            self._older("half-written files", (self.root / room).rglob(".*"), HALF_WRITTEN_S)

    def _older(self, kind: str, paths: Iterable[Path], age_s: float) -> None:
        for path in paths:
            if path.is_file() and self.now_s - _mtime(path) > age_s:
                self._remove(kind, path)

    def _kernels(self) -> None:
        """Folders of compiled kernels; a process that runs them has them mapped and goes on.

        What a process that forgot them left behind has a name that begins with a dot.
        """
        compiled = self.root / "compiled"
        for folder in sorted(compiled.iterdir()) if compiled.is_dir() and not compiled.is_symlink() else []:
            age_s = self.now_s - _mtime(folder)
            if re.fullmatch(r"[0-9a-f]{64}", folder.name):
                old = age_s > KERNELS_DAYS * DAY_S
            else:
                old = folder.name.startswith(".") and age_s > HALF_WRITTEN_S
            if not old or folder.is_symlink() or not folder.is_dir():
                continue
            size = sum(p.lstat().st_size for p in folder.rglob("*") if p.is_file())
            if not self.dry_run:
                shutil.rmtree(folder, ignore_errors=True)
            self._note("compiled kernels", size)

    def _folders(self) -> None:
        """Folders that became empty, the innermost first."""
        if self.dry_run:
            return
        for room in ("blobs", "artifacts", "stages", "content", "measurements", "references"):
            for folder in (self.root / room).glob("*/"):
                if not any(folder.iterdir()):
                    folder.rmdir()

    def _is_free(self, path: Path) -> bool:
        if not path.exists():
            return True
        with lock(path, wait=False) as free:
            return free

    def _remove(self, kind: str, path: Path, name: str | None = None) -> None:
        try:
            size = path.stat().st_size
            if not self.dry_run:
                path.unlink()
        except FileNotFoundError:  # its owner removed it meanwhile
            return
        self._note(kind, size, name)

    def _note(self, kind: str, size: int, name: str | None = None) -> None:
        self.counts[kind] += 1
        self.sizes[kind] += size
        if name is not None:
            self.names[kind].append(name)


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one where the file is damaged: whatever it told, nobody can read it."""
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
