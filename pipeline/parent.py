"""Ties between a worker process and the process that started it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
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
        "TRANSFORMERS_VERBOSITY": "error",
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",  # a crash in C leaves Python's stacks in the log
    }
