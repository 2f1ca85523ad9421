"""Loads whose files are not in memory: dropping them, and whose turn it is.

Pages that any process maps cannot be dropped, so of the stages that share files only the one that a launch loads first
can be timed cold. Every launch gives another of them its turn, which costs no process of its own; what is left over
when there are fewer launches than stages is loaded by processes that do nothing else.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from pipeline.artifact import Artifact

RESIDENT = 0.01
"""Files of which no more than this share is in memory count as dropped, and those that lack no more as being there."""

PROT_READ, MAP_SHARED = 1, 1
MAP_FAILED = ctypes.c_void_p(-1).value


class ColdLoads:
    """Which stages have still to be timed cold."""

    def __init__(self, artifacts: Mapping[str, Artifact]) -> None:
        self._files = {name: files_of(artifact) for name, artifact in artifacts.items()}
        # what torch.compile leaves behind is wanted by every later process, so those come first
        self._due = sorted(artifacts, key=lambda name: not is_compiled(artifacts[name]))
        self._read: set[Path] = set()

    @property
    def due(self) -> tuple[str, ...]:
        return tuple(self._due)

    def first(self, names: Iterable[str]) -> list[str]:
        """The stages, those that are due before the others; else their order stays."""
        given = list(names)
        return [n for n in self._due if n in given] + [n for n in given if n not in self._due]

    def files(self, name: str) -> frozenset[Path]:
        return self._files[name]

    def may(self, name: str, loaded: Iterable[str]) -> bool:
        """Whether the stage is due and shares no file with those that are loaded."""
        return name in self._due and not any(self._files[name] & self._files[other] for other in loaded)

    def done(self, name: str) -> None:
        """It was timed, or cannot be."""
        if name in self._due:
            self._due.remove(name)

    def is_warm(self, name: str) -> bool:
        """Whether the stage's files are in memory, as far as can be told: loads of this run read them, or all is there.

        A load reads what it needs of a file, which may be less than all of it. What has no files here is warm.
        """
        files = self._files.get(name, frozenset())
        return files <= self._read or is_in_memory(files)

    def was_read(self, name: str) -> None:
        """The stage was loaded."""
        self._read |= self._files.get(name, frozenset())

    def left_after(self, launches: int, groups: Sequence[Sequence[str]]) -> int:
        """How many stages remain when there have been so many more launches of the groups."""
        due = list(self._due)
        for _ in range(launches):
            for group in groups:
                loaded: list[str] = []
                for name in [n for n in due if n in group]:
                    if not any(self._files[name] & self._files[other] for other in loaded):
                        due.remove(name)
                    loaded.append(name)
        return len(due)


def files_of(artifact: Artifact) -> frozenset[Path]:
    """The files of the artifact's components: graphs and weights."""
    parts = artifact.manifest.components.values()
    return frozenset(artifact.locate(entry) for part in parts for entry in part.files.values())


def is_compiled(artifact: Artifact) -> bool:
    """Whether torch.compile makes its kernels when it is loaded."""
    return "compile" in artifact.manifest.execution


def drop_from_page_cache(files: Iterable[Path]) -> bool:
    """Have the kernel drop the files' pages from memory; False where it does not, or cannot be asked.

    What was written and is not on the disk yet is brought there first. Pages that a process maps stay, and so do those
    of a file system that lives in memory; whether they went is looked at afterwards, where the kernel tells.
    """
    if not hasattr(os, "posix_fadvise"):
        return False
    pages = resident = 0
    for path in files:
        try:
            handle = os.open(path, os.O_RDONLY)
        except OSError:
            return False
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            held = _resident_pages(handle)
        except OSError:
            return False
        finally:
            os.close(handle)
        pages += held[1]
        resident += held[0]
    return resident <= RESIDENT * pages


def is_in_memory(files: Iterable[Path]) -> bool:
    """Whether all of the files' pages are in memory; False where the kernel does not tell."""
    pages = resident = 0
    for path in files:
        try:
            handle = os.open(path, os.O_RDONLY)
        except OSError:
            return False
        try:
            held = _resident_pages(handle)
        finally:
            os.close(handle)
        if held == (0, 0) and path.stat().st_size:
            return False
        resident += held[0]
        pages += held[1]
    return resident >= (1 - RESIDENT) * pages


def _resident_pages(handle: int) -> tuple[int, int]:
    """(pages of an open file that are in memory, pages that it has); (0, 0) where that is not known.

    See mincore(2): of a file that is another user's the kernel does not tell.
    """
    if sys.platform != "linux":
        return 0, 0
    status = os.fstat(handle)
    size = status.st_size
    if not size or os.geteuid() not in (0, status.st_uid):
        return 0, 0
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    count = -(-size // os.sysconf("SC_PAGE_SIZE"))
    address = libc.mmap(None, size, PROT_READ, MAP_SHARED, handle, 0)
    if address == MAP_FAILED:
        return 0, 0
    try:
        flags = ctypes.create_string_buffer(count)
        if libc.mincore(address, size, flags):
            return 0, 0
    finally:
        libc.munmap(address, size)
    return sum(flag & 1 for flag in flags.raw[:count]), count
