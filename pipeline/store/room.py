"""Room on the store's disk."""

from __future__ import annotations

import errno
import shutil

from pipeline.store.store import Store

DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
"""Numbers of the errors by which the operating system says that a disk, or one's share of it, is full."""

HINT = "`pipeline cache gc` frees what no run needs"


def free_bytes(store: Store) -> int:
    """Free on the disk that the store is on, or will be on."""
    folder = next(place for place in (store.root, *store.root.parents) if place.exists())
    return shutil.disk_usage(folder).free


def too_little_room(store: Store, need_bytes: int) -> str:
    """Why `need_bytes` cannot be written, for a person; empty where there is room."""
    free = free_bytes(store)
    if need_bytes <= free:
        return ""
    return (
        f"it writes up to {_amount(need_bytes)} and {_amount(free)} are free for the store in {store.root}; "
        f"{HINT}, --force tries"
    )


def disk_is_full(store: Store, what: str) -> str:
    """That a write failed for lack of room, for a person."""
    return f"the disk is full: {what}; {_amount(free_bytes(store))} are free for the store in {store.root}; {HINT}"


def _amount(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:,.0f} MB" if size_bytes >= 10_000_000 else f"{size_bytes / 1e3:,.0f} kB"
