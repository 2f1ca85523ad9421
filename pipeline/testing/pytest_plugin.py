"""Fixtures for the tests of passes. pytest loads this with every test run: nothing is imported before it is used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pipeline.testing import FakeClock, FakeStore, Findings


@pytest.fixture(scope="session")
def pipeline_workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all checks of a test run share: what comes before passes is made in it once."""
    return tmp_path_factory.mktemp("pipeline-workspace")


@pytest.fixture
def pipeline_check_pass(pipeline_workspace: Path) -> Callable[..., Findings]:
    """`check_pass` in the shared workspace: `pipeline_check_pass("drop_identity").require_ok()`."""
    from pipeline.testing import check_pass

    def check(*given: Any, **options: Any) -> Findings:
        return check_pass(*given, **{"workspace": pipeline_workspace, **options})

    return check


@pytest.fixture(scope="session")
def pipeline_tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Llama of two layers and a tokenizer of bytes. No test may change it."""
    from pipeline.testing import tiny_llama

    return tiny_llama(tmp_path_factory.mktemp("pipeline-model"))


@pytest.fixture
def pipeline_store(tmp_path: Path) -> Iterator[FakeStore]:
    """A store of the test's own, in which a pass can be run without the engine."""
    from pipeline.testing import FakeStore

    with FakeStore(tmp_path / "pipeline-store") as store:
        yield store


@pytest.fixture
def pipeline_clock() -> FakeClock:
    """A clock on which time passes when it is told to."""
    from pipeline.testing import FakeClock

    return FakeClock()
