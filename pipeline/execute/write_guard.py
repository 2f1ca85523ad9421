"""Keeps a pass from writing anywhere but through its context.

Python tells of every file that it opens, makes, renames or removes before it does so; what would be written outside the
places below is refused with an error that the pass sees. What libraries in C write by themselves is not seen.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

CHANGES: dict[str, dict[int, int | None]] = {
    "os.mkdir": {0: 2},
    "os.rmdir": {0: 1},
    "os.remove": {0: 1},
    "os.rename": {0: 2, 1: 3},
    "os.link": {1: 3},
    "os.symlink": {1: 2},
    "os.truncate": {0: None},
    "os.chmod": {0: 2},
    "os.chown": {0: 3},
    "os.utime": {0: 3},
}
"""Python's events by which files change: which of their arguments are paths that do, and which is the folder that such
a path starts in."""

CACHES = ("XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE", "HF_MODULES_CACHE", "TORCH_HOME", "TORCHINDUCTOR_CACHE_DIR")
"""Environment variables that name folders in which libraries keep what they can make again."""


class WriteOutsideError(PermissionError):
    """The pass tried to write where it may not."""

    def __init__(self, path: str) -> None:
        super().__init__(errno.EACCES, "a pass may write through its context only, and not to", path)


class WriteGuard:
    """Refuses what would be written outside the staging folder, the folder for temporary files and libraries' caches.

    Nothing in the store may be written, though it lie in a cache folder, but for `staging` in it.
    """

    def __init__(self, staging: Path, store: Path) -> None:
        home = Path.home()
        named = [Path(os.environ[name]) for name in CACHES if os.environ.get(name)]
        self._staging = staging.resolve()
        self._store = store.resolve()
        self._allowed = [
            Path(tempfile.gettempdir()).resolve(),
            *(folder.resolve() for folder in (home / ".cache", home / ".triton", home / ".nv", *named)),
            Path("/dev"),
            Path("/proc"),
        ]
        self._compiled = self._store / "compiled"
        self.refused: list[str] = []
        self.active = False

    def install(self) -> None:
        """From now on, while `active`; a hook cannot be taken out again."""
        sys.addaudithook(self._hook)

    def watch(self, work: Callable[[], Any]) -> Any:
        """Do `work`. Where it gets over a refusal by itself, the log says so."""
        self.active = True
        try:
            return work()
        finally:
            self.active = False
            for path in dict.fromkeys(self.refused):
                logging.getLogger("pipeline.pass").warning("refused to write %s, outside the pass's context", path)

    def allows(self, path: Path) -> bool:
        """Whether the file or folder at this absolute path may be written."""
        if path.is_relative_to(self._staging) or path.is_relative_to(self._compiled):
            return True
        if path.is_relative_to(self._store):
            return False
        return "__pycache__" in path.parts or any(path.is_relative_to(folder) for folder in self._allowed)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.active or (event != "open" and event not in CHANGES):
            return
        for path in _written(event, arguments):
            if not self.allows(path):
                self.refused.append(str(path))
                raise WriteOutsideError(str(path))


def _written(event: str, arguments: tuple[Any, ...]) -> Iterator[Path]:
    """Paths that the event is about to change. Open descriptors were asked for before."""
    if event == "open":
        path, _, flags = arguments
        if isinstance(flags, int) and flags & WRITING and isinstance(path, str | bytes | os.PathLike):
            yield Path(os.path.realpath(os.fsdecode(path)))
        return
    for index, folder in CHANGES[event].items():
        path = arguments[index]
        if isinstance(path, str | bytes | os.PathLike):
            start = arguments[folder] if folder is not None else -1
            whole = Path(f"/proc/self/fd/{start}" if isinstance(start, int) and start >= 0 else ".", os.fsdecode(path))
            yield Path(os.path.realpath(whole.parent), whole.name)  # a link itself changes, not what it leads to
