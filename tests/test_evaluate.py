"""What cannot be loaded is its stage's failure; what fails while it is measured leaves the stage unmeasured."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pipeline.recipe import load_recipe
from pipeline.run import RunResult, run
from pipeline.store import Store

pytestmark = pytest.mark.slow

PASSES = """
import json
from pipeline import Pass

class Base(Pass):
    "Changes the config."
    accepts, produces = frozenset({"torch"}), "torch"
    def run(self, artifact, params, context):
        config = {**artifact.read_json("config.json"), **self.change}
        entry = context.output.file("config.json", json.dumps(config).encode())
        files = {**artifact.manifest.files, "config.json": entry}
        return type(artifact)(artifact.manifest.model_copy(update={"files": files}), artifact.blobs)

class TooWide(Base):
    name = "too_wide"
    change = {"hidden_size": 320}

class Plain(Base):
    name = "plain"
    change = {"hidden_size": 256}
"""

NAMES = {"too_wide": "TooWide", "plain": "Plain"}


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory, install: Callable[..., None]) -> RunResult:
    place = tmp_path_factory.mktemp("unloadable")
    install(place, "misleading_passes", PASSES, {n: f"misleading_passes:{c}" for n, c in NAMES.items()})
    passes = "passes=[{pass: too_wide}, {pass: plain}, {pass: plain, name: other, after: source}]"
    sets = [passes, "export=null", "gates=[]", "hardware=local", "evaluate.budget_s=1", "evaluate.quality.tokens=600"]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(place))
        patch.setenv("PYTHONPATH", str(place))
        return run(load_recipe("llama2-cpu", sets), store=Store(place / "store"), runs=place / "runs")


def test_a_stage_whose_model_does_not_load_failed_with_its_reason_and_log(result: RunResult) -> None:
    stage = result.report.stage("too_wide")
    assert stage.status == "failed"
    assert str(stage.reason).startswith("its model does not load: ")
    assert stage.log is not None
    assert (result.folder / stage.log).is_file()
    assert result.exit_code == 3


@pytest.mark.parametrize("name", ["plain", "other"])
def test_what_was_made_from_it_and_other_branches_are_measured(name: str, result: RunResult) -> None:
    stage = result.report.stage(name)
    assert stage.status in {"ran", "cached"}
    assert stage.speed
    assert stage.quality is not None


def test_it_is_not_exported(result: RunResult) -> None:
    assert result.report.export == "other"
