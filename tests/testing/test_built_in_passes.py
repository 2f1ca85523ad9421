"""All built-in passes stand the checks that strangers' passes are held to."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points

import pytest

from pipeline.plugin import PASSES, Registry
from pipeline.testing import Findings
from pipeline.testing.conformance import examples_of

BUILT_IN = sorted(point.name for point in entry_points(group=PASSES) if point.module.startswith("passes."))


BY_HAND = {("compile_torch", 1), ("export_onnx", 1)}
"""With `verify`, these compare with torch as well, which takes a minute or two here and is what their own tests try."""

LEFT_OUT = {"compile_torch": ("tolerance",)}
"""It takes most of a minute to compile a model only to score it; test_compile_torch compares compiled logits."""


WARNED = {"olive": ("key",)}
"""Which of its parameters apply depends on the type, and the kit cannot guess; test_olive changes them."""


def cases() -> list[tuple[str, int]]:
    """The examples of the built-in passes."""
    registry = Registry()
    found = [(name, index) for name in BUILT_IN for index, _ in enumerate(examples_of(registry.load(name)))]
    return [case for case in found if case not in BY_HAND]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "index"), cases())
def test_a_built_in_pass_stands_all_checks(name: str, index: int, check: Callable[..., Findings]) -> None:
    skip = LEFT_OUT.get(name, ())
    found = check(name, example=examples_of(Registry().load(name))[index], skip=skip)
    warned = WARNED.get(name, ())
    expected = {f.check: "skipped" if f.check in skip else "warning" if f.check in warned else "passed" for f in found}
    assert {f.check: f.outcome for f in found} == expected, str(found)


def test_there_are_built_in_passes() -> None:
    assert len(BUILT_IN) >= 12
