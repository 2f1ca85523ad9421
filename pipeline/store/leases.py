"""What running processes use, so that what collects garbage in another process leaves it alone.

A lease is a file below leases/ that its owner holds locked: one line of JSON about the owner, then one for each
artifact that it uses. The kernel frees the lock when the owner dies; a lease whose lock is free has no owner.

Whoever finds an artifact and enters it into a lease holds the gate with others meanwhile; whoever collects garbage
holds it alone. So nothing vanishes between being found and being entered.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from pipeline.store.locks import lock

RUN_IN_THE_MAKING = re.compile(r"\.\d{8}-\d{6}-[\w-]+")
"""Name of a run's folder until the run is complete. Nothing else is ever removed for a lease that names it."""


class Lease:
    """What one process uses."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._held: set[str] = set()

    def add(self, artifact: str) -> None:
        """Enter an artifact, by digest. The caller holds the gate."""
        if artifact not in self._held:
            self._append({"artifact": artifact})
            self._held.add(artifact)

    def _append(self, line: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def gate(root: Path, *, alone: bool = False) -> AbstractContextManager[bool]:
    """The gate of the store at `root`: shared by who uses artifacts, held `alone` by who removes them."""
    return lock(root / "locks" / "gate", shared=not alone)


@contextmanager
def open_lease(root: Path, folder: Path | None) -> Iterator[Lease]:
    """A lease of this process; `folder` is the run's in the making, to be removed if the process dies."""
    sweep_leases(root)
    path = root / "leases" / f"{secrets.token_hex(8)}.jsonl"
    with lock(path):
        lease = Lease(path)
        try:
            lease._append({"pid": os.getpid(), "folder": str(folder.absolute()) if folder else None})
            yield lease
        finally:
            path.unlink(missing_ok=True)


def leased(root: Path) -> set[str]:
    """Digests of the artifacts that living processes use. The caller holds the gate alone."""
    found: set[str] = set()
    for path in _leases(root):
        with lock(path, wait=False) as dead:
            if not dead:
                found |= {str(line["artifact"]) for line in _lines(path) if "artifact" in line}
    return found


def sweep_leases(root: Path, *, dry_run: bool = False) -> list[Path]:
    """Remove leases of dead processes and the run folders that those left unfinished; returns these folders."""
    left = []
    for path in _leases(root):
        with lock(path, wait=False) as dead:
            if not dead:
                continue
            for folder in {Path(str(line["folder"])) for line in _lines(path) if line.get("folder")}:
                if RUN_IN_THE_MAKING.fullmatch(folder.name) and folder.is_dir() and not folder.is_symlink():
                    left.append(folder)
                    if not dry_run:
                        shutil.rmtree(folder, ignore_errors=True)
            if not dry_run:
                path.unlink(missing_ok=True)
    return left


def _leases(root: Path) -> list[Path]:
    return sorted((root / "leases").glob("*.jsonl"))


def _lines(path: Path) -> list[dict[str, Any]]:
    """The lines that are whole: one may be in the middle of being written, or its writer died there."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:  # its owner ended meanwhile
        return []
    found = []
    for line in text.splitlines():
        try:
            said = json.loads(line)
        except ValueError:
            continue
        if isinstance(said, dict):
            found.append(said)
    return found
