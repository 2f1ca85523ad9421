"""Formats that something here makes or takes: what a pass may say that it accepts and produces."""

from __future__ import annotations

from pipeline.errors import PipelineError
from pipeline.plugin import Pass, Registry
from pipeline.runtime.protocol import known_formats

SOURCES = frozenset({"torch", "onnx"})
"""Formats that a recipe's model may have."""


def made_formats(*, but: str) -> frozenset[str]:
    """Those that models come in, or that some installed pass, other than `but`, yields by default."""
    return SOURCES | {found.produces for found in _passes(but)}


def taken_formats(*, but: str) -> frozenset[str]:
    """Those that a runner loads, or that some installed pass, other than `but`, takes by default."""
    return known_formats().union(*(found.accepts for found in _passes(but)))


def _passes(but: str) -> list[type[Pass]]:
    registry = Registry()
    found = []
    for name in registry.names():
        if name == but:
            continue
        try:
            found.append(registry.load(name))
        except PipelineError:  # a stranger's that cannot be imported says nothing of this one
            continue
    return found
