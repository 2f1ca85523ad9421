"""Running a plan: each pass in a worker process of its own.

The names below load on first use: a worker, which is a module of this package, needs neither plans nor stores.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.execute.stages import Cost, StageResult, Watch, execute

__all__ = ["Cost", "StageResult", "Watch", "execute"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'pipeline.execute' has no attribute {name!r}")
    return getattr(import_module("pipeline.execute.stages"), name)
