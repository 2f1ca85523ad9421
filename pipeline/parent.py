"""Ties between a worker process and the process that started it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER, PR_GET_CHILD_SUBREAPER = 36, 37
PARENT = "PIPELINE_PARENT"
"""Environment variable with the number of the process that started a worker."""


def die_with_parent() -> None:
    """Have the kernel kill this process when the process that started it dies, by whatever means. Linux only.

    Elsewhere a worker notices when it next writes to its parent.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(os.environ.get(PARENT, os.getppid())):  # it died before this process came so far
        os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def adopting_orphans() -> Iterator[None]:
    """Have descendants whose parents end become this process's children meanwhile, and not init's. Linux only.

    Raises: OSError where the kernel refuses.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    before = ctypes.c_int(0)
    asked = libc.prctl(PR_GET_CHILD_SUBREAPER, ctypes.byref(before))
    if asked or libc.prctl(PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(1)):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    try:
        yield
    finally:
        libc.prctl(PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(before.value))


def worker_environment(threads: int) -> dict[str, str]:
    """The environment of a worker: this process's, with the number of threads set and the network left alone."""
    return {
        **os.environ,
        PARENT: str(os.getpid()),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",  # whatever a stage needs is in its artifact
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "ORT_DISABLE_TELEMETRY": "1",  # importing onnxruntime would start its uploader, a thread that sends
        "TRANSFORMERS_VERBOSITY": "error",
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",  # a crash in C leaves Python's stacks in the log
    }
