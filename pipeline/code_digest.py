"""What a class or function computes with, as one digest: the sources of its module and of what that imports.

Of its own package, that is. It is found by reading, and nothing is imported for it.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any


def code_digest(found: Any) -> str:
    """SHA-256 over the sources of the module of a class or function, and those of its package that it imports.

    Imports are read from the source, inside functions too, so nothing is imported to find out.
    """
    package = found.__module__.partition(".")[0]
    seen: dict[str, bytes] = {}
    waiting = [found.__module__]
    while waiting:
        module = waiting.pop()
        if module in seen:
            continue
        path = _source_of(module)
        if path is None:
            continue
        seen[module] = path.read_bytes()
        waiting += _imports_within(seen[module], module, package, is_package=path.name == "__init__.py")
    total = hashlib.sha256()
    for module, source in sorted(seen.items()):
        total.update(f"{module}\0{hashlib.sha256(source).hexdigest()}\0".encode())
    return total.hexdigest()


def _source_of(module: str) -> Path | None:
    """The file of a module, found below its top-level package's folder: looking for it otherwise would import it."""
    loaded = getattr(sys.modules.get(module), "__file__", None)
    if loaded is not None:
        return Path(loaded) if loaded.endswith(".py") else None
    top, *rest = module.split(".")
    package = sys.modules.get(top)
    if package is None or not rest:
        return None
    for folder in getattr(package, "__path__", ()):
        base = Path(folder).joinpath(*rest)
        for candidate in (base.with_name(base.name + ".py"), base / "__init__.py"):
            if candidate.is_file():
                return candidate
    return None


@cache
def _imports_within(source: bytes, module: str, package: str, *, is_package: bool) -> list[str]:
    mentioned = rb"\b(?:from\s+\.|(?:from|import)\b[^\n]*\b" + re.escape(package.encode()) + rb"\b)"
    if re.search(mentioned, source) is None:  # parsing is slow, and most modules import none of their own package
        return []
    found: list[str] = []
    for node in _statements(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".") if is_package else module.split(".")[:-1]
                base = ".".join([*parts[: len(parts) - node.level + 1], *([base] if base else [])])
            found += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return [name for name in found if name == package or name.startswith(package + ".")]


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """Every statement below `node`. Imports are statements: to look into expressions would take five times as long."""
    for part in ("body", "orelse", "finalbody", "handlers", "cases"):
        for inner in getattr(node, part, ()):
            yield inner
            yield from _statements(inner)
