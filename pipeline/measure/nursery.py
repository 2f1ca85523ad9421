"""The process that imports libraries once and forks a launch's workers: `python -m pipeline.measure.nursery`.

It is begun by exec, so where its libraries and its heap lie in memory is drawn anew; its forks share that, and load
their own artifacts. Nothing is loaded here: a thread pool, a session or a model would not survive a fork. Requests come
as JSON lines on a socket that is standard input; each gets one JSON line, `{"ok": …}` or `{"error": …}`.

    import   manifest, blobs, spec                       -> unfit: why no worker can be forked from here, or nothing
    fork     (with standard input, output and error)     -> pid

A fork becomes a worker (see pipeline.measure.worker). It is a grandchild, which the process that began the nursery
adopts: so the worker's parent is the same as that of one begun by exec, and neither needs the nursery from there on.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import socket
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

from pipeline.artifact import Artifact, Manifest
from pipeline.errors import PipelineError
from pipeline.measure import worker
from pipeline.parent import die_with_parent
from pipeline.runtime import ExecutionSpec

STANDARD_STREAMS = 3
THREADS = Path("/proc/self/task")

MOST_PAGES = 4096
MOST_HEAP_BYTES = 2**16


def serve(channel: socket.socket) -> list[int] | None:
    """Answer requests until their stream ends. Returns twice and more: in every fork, with its standard streams."""
    waiting, handles = b"", list[int]()
    while True:
        while b"\n" not in waiting:
            data, received, *_ = socket.recv_fds(channel, 2**16, STANDARD_STREAMS)
            handles += received
            if not data:
                return None
            waiting += data
        line, _, waiting = waiting.partition(b"\n")
        fields = json.loads(line)
        try:
            if fields.pop("request") == "import":
                answer: dict[str, Any] = {"unfit": _import(**fields)}
            else:
                pid = _fork()
                if pid is None:
                    return handles
                answer = {"pid": pid}
            told: dict[str, Any] = {"ok": answer}
        except (PipelineError, OSError) as error:
            told = {"error": str(error)}
        for handle in handles:
            os.close(handle)
        handles.clear()
        channel.sendall(json.dumps(told).encode() + b"\n")


def _import(manifest: dict[str, Any], blobs: str, spec: dict[str, Any]) -> str | None:
    """Import what the artifact's runner needs; why this process cannot be forked from, if it cannot.

    What goes wrong is left to the worker, which imports again and tells it of its own artifact.
    """
    artifact = Artifact(Manifest.model_validate(manifest), Path(blobs))
    execution = ExecutionSpec.model_validate(spec)
    if worker.optional(artifact, "import_libraries") is None:
        return f"the runner of {artifact.format} does not say what to import"
    try:
        worker.prepare(artifact, execution)
    except Exception:
        traceback.print_exc()
    threads = _threads_after_a_fork()
    if threads == 1:
        return None
    started = "a thread" if threads == 2 else f"{threads - 1} threads"
    return f"importing for {artifact.format} starts {started}, which no fork would have"


def _threads_after_a_fork() -> int:
    """The threads that this process has when it has forked: libraries may stop theirs for that, as OpenBLAS does."""
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # Python 3.12 warns of threads
        child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return len(list(THREADS.iterdir()))


def _fork() -> int | None:
    """The number of a new worker; None in the worker itself.

    Raises: OSError where there is no room for another process.
    """
    ready, tell = os.pipe()
    between = os.fork()
    if between == 0:
        between = os.getpid()
        try:
            pid = os.fork()
        except OSError:
            os._exit(1)
        if pid:
            os.write(tell, str(pid).encode())
            os._exit(0)
        os.close(ready)
        os.close(tell)
        os.setsid()
        while os.getppid() == between:  # its end is the last thing that the kernel tells of
            time.sleep(0.0002)
        return None
    os.close(tell)
    pid_told = os.read(ready, 32)
    os.close(ready)
    os.waitpid(between, 0)
    if not pid_told:
        raise OSError("another process cannot be started")
    return int(pid_told)


def _draw_layout() -> tuple[mmap.mmap, bytearray]:
    """Reserve some pages and some of the heap, which moves what comes after: forks would all have it at one place.

    They are never touched and take no memory; they must be kept.
    """
    pages = random.randint(1, MOST_PAGES)  # noqa: S311 (a place, not a secret; a fork has random numbers of its own)
    heap = random.randint(1, MOST_HEAP_BYTES)  # noqa: S311
    return mmap.mmap(-1, pages * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=0), bytearray(heap)


def main() -> None:
    die_with_parent()
    channel = socket.socket(fileno=os.dup(0))
    os.dup2(2, 1)
    streams = serve(channel)
    channel.close()
    if streams is None:
        return
    for target, handle in enumerate(streams):
        os.dup2(handle, target)
        os.close(handle)
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed()  # each its own, as processes begun by exec have
    kept = _draw_layout()
    worker.main()
    del kept


if __name__ == "__main__":
    main()
