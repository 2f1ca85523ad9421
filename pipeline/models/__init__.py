"""Where models come from: built in, a folder, the Hugging Face hub, an ONNX file, an architecture and a seed.

The names below load on first use: what only reads the header of a weights file needs none of these.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.models.source import Source, builtin_names, evaluation_text, find_source, source_artifact

__all__ = ["Source", "builtin_names", "evaluation_text", "find_source", "source_artifact"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'pipeline.models' has no attribute {name!r}")
    return getattr(import_module("pipeline.models.source"), name)
