"""All built-in passes stand the checks that strangers' passes are held to."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points

import pytest

from pipeline.plugin import PASSES, Registry
from pipeline.testing import Findings
from pipeline.testing.conformance import examples_of

BUILT_IN = sorted(point.name for point in entry_points(group=PASSES) if point.module.startswith("passes."))


def cases() -> list[tuple[str, int]]:
    """Every example of every built-in pass."""
    registry = Registry()
    return [(name, index) for name in BUILT_IN for index, _ in enumerate(examples_of(registry.load(name)))]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "index"), cases())
def test_a_built_in_pass_stands_all_checks(name: str, index: int, check: Callable[..., Findings]) -> None:
    found = check(name, example=examples_of(Registry().load(name))[index])
    assert {f.check: f.outcome for f in found} == dict.fromkeys([f.check for f in found], "passed"), str(found)


def test_there_are_built_in_passes() -> None:
    assert len(BUILT_IN) >= 12
