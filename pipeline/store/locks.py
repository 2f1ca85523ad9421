"""Locks between processes. The kernel gives a lock back when its holder dies, by whatever means."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def lock(path: Path, *, shared: bool = False, wait: bool = True) -> Iterator[bool]:
    """Hold the lock file `path`, alone or `shared` with others who share it; made where it is missing.

    Yields True, or False where another holds it and `wait` is false.
    """
    handle = _acquire(path, shared=shared, wait=wait)
    if handle is None:
        yield False
        return
    try:
        yield True
    finally:
        os.close(handle)  # which gives the lock back


def remove_if_free(path: Path) -> bool:
    """Remove the lock file `path` unless somebody holds it; True where it is gone."""
    if not path.exists():
        return True
    with lock(path, wait=False) as free:
        if free:
            path.unlink(missing_ok=True)
        return free


def _acquire(path: Path, *, shared: bool, wait: bool) -> int | None:
    """A descriptor that holds the lock; None where another does.

    Between opening the file and locking it, it can be swept: a lock on a file that has no name excludes nobody, so the
    name is looked at again.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    how = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, how)
            if _is_still(handle, path):
                return handle
        except BlockingIOError:
            os.close(handle)
            return None
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _is_still(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False
