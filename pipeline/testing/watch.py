"""What a pass reads and writes that it was not given, seen from inside its process.

The worker is told to be around the pass with `watching`, from the pass's import on. It sees

- environment variables that are read from Python, whichever way `os.environ` was imported,
- files that are opened and folders that are listed from Python; what a library opens in C is not seen,
- context facets that are asked for and not declared, even where the pass goes on without them.

Only what the pass's own package does counts: the innermost frame that is not of the standard library tells. What a
library does that the pass calls is told apart, as libraries have settings and caches of their own; what pipeline does
for the pass, and what importing a module does, is not told.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from pipeline.artifact import Artifact, Manifest
from pipeline.errors import PipelineError
from pipeline.execute import write_guard
from pipeline.execute.request import Request
from pipeline.plugin import PassContext, Registry

OBSERVER = f"{__name__}:watching"

ENVIRONMENT, FILES, LIBRARIES, WRITES, FACETS = "environment", "files", "files_of_libraries", "writes", "facets"
"""Keys of what was seen: what -> where in the pass's package."""

SYSTEM = ("/proc", "/sys", "/dev")
OF_THE_STANDARD_LIBRARY = frozenset({"PATH", "TMPDIR", "TEMP", "TMP"})
"""Variables that it reads to find a program or a place for temporary files: not a pass's choice."""

IMPORTING = frozenset({"importlib", "_frozen_importlib", "_frozen_importlib_external", "linecache"})
"""Modules that import others, say which version is installed, or show the source of what is."""

PROBING = "_get_default_tempdir"
"""The function that looks where temporary files can be written, by writing one."""

READS = frozenset({"open", "os.listdir", "os.scandir"})
CHANGES = {**{event: tuple(paths) for event, paths in write_guard.CHANGES.items()}, "shutil.rmtree": (0,)}
"""Events that change files, and which of their arguments are paths of what changes."""

MADE = {"os.mkdir": 0, "os.rename": 1, "os.link": 1, "os.symlink": 1}
"""Of those, which argument is what is there afterwards."""


@contextmanager
def watching(request: Request, folder: Path) -> Iterator[dict[str, dict[str, str]]]:
    """Watch this process until the end; yields what is seen, as it is seen."""
    watcher = Watcher(request, folder)
    read, ask = os._Environ.__getitem__, PassContext.facet

    def reading(self: Any, key: Any) -> Any:
        watcher.saw_variable(key)
        return read(self, key)

    def asking(self: PassContext, name: str) -> Any:
        try:
            return ask(self, name)
        except PipelineError:
            watcher.saw_facet(name)
            raise

    os._Environ.__getitem__ = reading  # type: ignore[method-assign]
    PassContext.facet = asking  # type: ignore[method-assign]
    sys.addaudithook(watcher.audit)  # which cannot be taken away again
    try:
        yield watcher.seen
    finally:
        watcher.active = False
        os._Environ.__getitem__ = read  # type: ignore[method-assign]
        PassContext.facet = ask  # type: ignore[method-assign]


class Caller(NamedTuple):
    """Who did something: where in the pass's package, and through which library, if any."""

    place: str
    library: str | None
    is_direct: bool
    """No function of the standard library lies between."""


class Watcher:
    """Sees what happens in this process and keeps what the pass's package is behind."""

    def __init__(self, request: Request, folder: Path) -> None:
        self.seen: dict[str, dict[str, str]] = {kind: {} for kind in (ENVIRONMENT, FILES, LIBRARIES, WRITES, FACETS)}
        self.active = True
        module = request.code.module if request.code else Registry().info(request.pass_name).entry_point.module
        self._package = module.partition(".")[0]
        self._staging = os.path.realpath(folder)
        self._files, self._folders = _given(request)
        self._folders |= {self._staging, *SYSTEM, *_installation(), *_own_files(self._package)}
        self._made: set[str] = set()

    def saw_variable(self, key: Any) -> None:
        if not self.active or (caller := self._caller()) is None or caller.library:
            return
        name = os.fsdecode(key)
        if caller.is_direct or name not in OF_THE_STANDARD_LIBRARY:
            self._note(ENVIRONMENT, name, caller)

    def saw_facet(self, name: str) -> None:
        if self.active and (caller := self._caller(on_its_behalf=True)) is not None:
            self._note(FACETS, name, caller)

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.active:
            return
        if event in READS:
            path = _path(arguments[0]) if arguments else None
            if path is None:
                return
            if event == "open" and _writes(arguments):
                self._saw_write(path)
                self._made.add(path)
            else:
                self._saw_read(path)
        else:
            for index in CHANGES.get(event, ()):
                if (path := _path(arguments[index], follow=False)) is not None:
                    self._saw_write(path)
                    if MADE.get(event) == index:
                        self._made.add(path)

    def _saw_read(self, path: str) -> None:
        if self._is_given(path) or _below(path, self._made):
            return
        if (caller := self._caller()) is not None:
            self._note(LIBRARIES if caller.library else FILES, path, caller)

    def _saw_write(self, path: str) -> None:
        if _below(path, {self._staging, "/dev"}):
            return
        caller = self._caller()
        if caller is not None and caller.library is None:
            self._note(WRITES, path, caller)

    def _is_given(self, path: str) -> bool:
        return path in self._files or _below(path, self._folders)

    def _note(self, kind: str, what: str, caller: Caller) -> None:
        through = f", through {caller.library}" if caller.library else ""
        self.seen[kind].setdefault(what, caller.place + through)

    def _caller(self, *, on_its_behalf: bool = False) -> Caller | None:
        """Who is behind what happens now; None where it is not the pass's package.

        `on_its_behalf`: what we do for the pass counts, too.
        """
        frame: FrameType | None = sys._getframe(2)
        library, is_direct = None, True
        while frame is not None:
            module = str(frame.f_globals.get("__name__", ""))
            top = module.partition(".")[0]
            if top == self._package:
                return Caller(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}", library, is_direct)
            if module == __name__:
                pass
            elif top in IMPORTING or (top == "pipeline" and not on_its_behalf) or frame.f_code.co_name == PROBING:
                return None
            elif top in sys.stdlib_module_names:
                is_direct = is_direct and top in {"os", "_collections_abc"}  # os.environ.get itself
            else:
                library = library or top
            frame = frame.f_back
        return None


def _given(request: Request) -> tuple[set[str], set[str]]:
    """(files, folders) that the pass was given: those of its artifacts, and what its parameters name."""
    blobs = Path(request.blobs)
    manifests: list[Manifest] = [m for m in (request.artifact, *request.inputs.values()) if m is not None]
    artifacts = [Artifact(manifest, blobs) for manifest in manifests]
    files = {os.path.realpath(a.locate(entry)) for a in artifacts for _, entry in a.manifest.entries()}
    named = {os.path.realpath(text) for text in _texts(request.params) if os.path.isabs(text)}  # noqa: PTH117
    return files, named


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)


def _installation() -> set[str]:
    """Folders of Python and of what is installed."""
    found = {sys.prefix, sys.base_prefix, sys.exec_prefix, *sysconfig.get_paths().values()}
    found |= {folder for folder in sys.path if Path(folder).name in ("site-packages", "dist-packages")}
    return {os.path.realpath(folder) for folder in found}


def _own_files(package: str) -> set[str]:
    """The package's folder, or the file of one that is a single module."""
    spec = find_spec(package)
    if spec is None:
        return set()
    places = list(spec.submodule_search_locations or ([spec.origin] if spec.origin else []))
    return {os.path.realpath(place) for place in places}


def _path(argument: Any, *, follow: bool = True) -> str | None:
    """The absolute path of an event's argument, where a link leads; None where it is none, as of an open file.

    Without `follow` the last name of the path is the link itself.
    """
    if isinstance(argument, int) or argument is None:
        return None
    try:
        text = os.fsdecode(argument)
    except TypeError:
        return None
    if follow:
        return os.path.realpath(text)
    folder, name = os.path.split(os.path.abspath(text))  # noqa: PTH100
    return os.path.join(os.path.realpath(folder), name)  # noqa: PTH118


def _below(path: str, places: set[str]) -> bool:
    """Whether the path is one of the places or below one."""
    while path not in places:
        parent = os.path.dirname(path)  # noqa: PTH120
        if parent == path:
            return False
        path = parent
    return True


def _writes(arguments: tuple[Any, ...]) -> bool:
    """Whether an `open` event, (path, mode, flags), is for writing."""
    _, mode, flags = (*arguments, None, None)[:3]
    if isinstance(mode, str):
        return any(letter in mode for letter in "wax+")
    return isinstance(flags, int) and bool(flags & write_guard.WRITING)
