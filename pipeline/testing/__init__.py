"""For authors of passes: the checks that every pass has to stand, and fakes for tests of their own.

`check_pass` runs a pass on a small real model, as a run does, and says what it found; `pipeline passes check NAME` does
the same. The names below load on first use: whoever imports this package, as pytest does, pays for what it uses.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.testing.conformance import check_pass
    from pipeline.testing.fakes import FakeClock, FakeRunner, FakeStore
    from pipeline.testing.findings import Finding, Findings
    from pipeline.testing.models import tiny_llama

_HOMES = {
    "FakeClock": "fakes",
    "FakeRunner": "fakes",
    "FakeStore": "fakes",
    "Finding": "findings",
    "Findings": "findings",
    "check_pass": "conformance",
    "tiny_llama": "models",
}

__all__ = ["FakeClock", "FakeRunner", "FakeStore", "Finding", "Findings", "check_pass", "tiny_llama"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pipeline.testing' has no attribute {name!r}")
    return getattr(import_module(f"pipeline.testing.{_HOMES[name]}"), name)
