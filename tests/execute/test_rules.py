"""What a pass tells of its rules reaches the results, and is remembered with the artifact."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import PassContext, PipelineError
from pipeline.execute import StageResult
from pipeline.store import Store
from pipeline.store.writer import OutputWriter

TALES = '''
from pipeline import Pass, PassParams


class Tell(Pass):
    """Tell of rules, and change nothing."""

    name = "tell"
    accepts, produces = frozenset({"torch"}), "torch"

    class Params(PassParams):
        done: int = 0

    def run(self, artifact, params, context):
        context.count_rule("fuse", params.done, 155)
        return artifact
'''


@pytest.fixture
def tell(install: Callable[..., None], tmp_path: Path, plugins: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "tales"
    folder.mkdir()
    install(folder, "tales", TALES, {"tell": "tales:Tell"})
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{plugins}")


@pytest.mark.usefixtures("tell")
def test_counts_come_back_from_the_worker_and_from_the_store(run_passes: Callable[..., dict[str, StageResult]]) -> None:
    ran = run_passes("[{pass: tell, done: 3}]")["tell"]
    assert (ran.status, ran.rules) == ("ran", {"fuse": (3, 155)})
    cached = run_passes("[{pass: tell, done: 3}]")["tell"]
    assert (cached.status, cached.rules) == ("cached", {"fuse": (3, 155)})


@pytest.mark.usefixtures("tell")
def test_counts_are_found_where_the_contents_were_the_same(run_passes: Callable[..., dict[str, StageResult]]) -> None:
    """Another history, the same input: the artifact comes from the store, and so does what was told of it."""
    run_passes("[{pass: tell, done: 2}]")
    later = run_passes("[{pass: same}, {pass: tell, done: 2}]")["tell"]
    assert (later.status, later.rules) == ("cached", {"fuse": (2, 155)})


@pytest.mark.usefixtures("tell")
def test_a_count_that_cannot_be_fails_the_stage(run_passes: Callable[..., dict[str, StageResult]]) -> None:
    failed = run_passes("[{pass: tell, done: 200}]")["tell"]
    assert failed.status == "failed"
    assert "'fuse' was counted as done 200 times out of 155" in str(failed.reason)


@pytest.mark.usefixtures("tell", "store")
def test_the_report_says_where_the_pass_tells_of_more_than_was_found(tmp_path: Path, checkpoint: Path) -> None:
    from pipeline.recipe.load import recipe_from_text
    from pipeline.run import run

    text = f"version: 1\nname: x\nmodel: {{path: {checkpoint}}}\npasses: [{{pass: tell, done: 3}}]\n"
    result = run(recipe_from_text(text, file="r.yaml", folder=tmp_path), measure=False, runs=tmp_path / "runs")
    effect = json.loads((result.folder / "report.json").read_text())["stages"][1]["effect"]
    assert (effect["kind"], effect["rules"]) == ("none", {"fuse": [3, 155]})
    assert effect["contradiction"] == "the pass tells of fuse 3 of 155, and nothing was found changed"


def test_counts_of_one_rule_add_up(tmp_path: Path, store: Store) -> None:
    with store.staging() as staging:
        context = PassContext(output=OutputWriter(staging))
        context.count_rule("fuse", 2, 10)
        context.count_rule("fuse", 1, 8)
        context.count_rule("drop", 0, 10)
    assert context.rules == {"fuse": (3, 10), "drop": (0, 10)}


@pytest.mark.parametrize("done", [-1, 3])
def test_a_count_beyond_its_candidates_is_refused(done: int, store: Store) -> None:
    with store.staging() as staging, pytest.raises(PipelineError, match="out of 2"):
        PassContext(output=OutputWriter(staging)).count_rule("fuse", done, 2)
