"""Peak memory of a process tree, sampled.

Two figures: `memory` is anonymous and shared memory (RssAnon + RssShmem of /proc/PID/status), what the tree itself
holds; `rss` also counts pages of mapped files, which the kernel can drop at any time. A model that is mapped from its
file shows in the second and not in the first.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

PROC = Path("/proc")


class MemoryUse(NamedTuple):
    """Memory of a process tree at one moment, in bytes. A shared page counts once for every process that maps it."""

    memory_bytes: int
    rss_bytes: int


def tree_memory(pid: int) -> MemoryUse:
    """Memory of the process `pid` and all its descendants now; zeros where it is gone."""
    return _tree_from_proc(pid) if (PROC / "self" / "status").exists() else _tree_from_psutil(pid)


class MemorySampler:
    """Samples the memory of a process tree in a thread and keeps the peaks.

    A peak shorter than the interval can be missed: the figures are lower bounds.
    """

    def __init__(self, pid: int, interval_s: float = 0.02) -> None:
        self.pid = pid
        self.interval_s = interval_s
        self.peak_memory_bytes = 0
        self.peak_rss_bytes = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"memory of {pid}", daemon=True)

    def __enter__(self) -> Self:
        self.sample()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        self.sample()

    def sample(self) -> MemoryUse:
        """Take one sample now, fold it into the peaks, and return it."""
        use = tree_memory(self.pid)
        self.peak_memory_bytes = max(self.peak_memory_bytes, use.memory_bytes)
        self.peak_rss_bytes = max(self.peak_rss_bytes, use.rss_bytes)
        return use

    def _run(self) -> None:
        while not self._done.wait(self.interval_s):
            self.sample()


def _tree_from_proc(pid: int) -> MemoryUse:
    memory = rss = 0
    waiting, seen = [pid], set()
    while waiting:
        current = waiting.pop()
        if current in seen:
            continue
        seen.add(current)
        fields = _status(current)
        memory += fields.get("RssAnon", 0) + fields.get("RssShmem", 0)
        rss += fields.get("VmRSS", 0)
        waiting += _children(current)
    return MemoryUse(memory, rss)


def _status(pid: int) -> dict[str, int]:
    """The Rss and VmRSS lines of /proc/PID/status in bytes; empty where the process is gone or a zombie."""
    try:
        text = (PROC / str(pid) / "status").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    found = {}
    for line in text.splitlines():
        if line.startswith(("Rss", "VmRSS")):
            name, _, value = line.partition(":")
            found[name] = int(value.split()[0]) * 1024
    return found


def _children(pid: int) -> list[int]:
    """Children of every thread of the process; empty where it is gone."""
    if not (PROC / "thread-self" / "children").exists():  # the kernel was built without these files
        import psutil

        try:
            return [child.pid for child in psutil.Process(pid).children()]
        except psutil.Error:
            return []
    found: list[int] = []
    try:
        tasks = list((PROC / str(pid) / "task").iterdir())
    except OSError:
        return []
    for task in tasks:
        with suppress(OSError):  # a thread that ended meanwhile
            found += map(int, (task / "children").read_text().split())
    return found


def _tree_from_psutil(pid: int) -> MemoryUse:
    """Where there is no /proc: memory is what would be freed if the processes ended now (USS)."""
    import psutil

    memory = rss = 0
    try:
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            try:
                full = process.memory_full_info()
            except psutil.Error:
                continue
            memory += full.uss
            rss += full.rss
    except psutil.Error:
        pass
    return MemoryUse(memory, rss)
