"""pytest finds the fixtures, and pays nothing for them before it uses them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.testing import FakeClock, FakeStore, Findings

HEAVY = ("numpy", "torch", "onnx", "pydantic", "pipeline.plugin", "pipeline.testing.conformance")


def test_loading_the_plugin_imports_nothing() -> None:
    code = f"import pipeline.testing.pytest_plugin, sys\nprint([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_fixtures_are_there(
    pipeline_store: FakeStore, pipeline_clock: FakeClock, pipeline_tiny_model: Path
) -> None:
    assert pipeline_clock() == 0
    assert pipeline_store.model(pipeline_tiny_model).format == "torch"


@pytest.mark.slow
@pytest.mark.usefixtures("careless")
def test_a_pass_is_checked_by_a_fixture(pipeline_check_pass: Callable[..., Findings]) -> None:
    """Models are scored in processes of their own, as everywhere but in our other tests."""
    found = pipeline_check_pass("frank")
    found.require_ok()
    assert found["tolerance"].outcome == "passed"
