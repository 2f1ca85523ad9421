"""The fakes keep the contracts of what they stand for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline import Artifact, Pass, PassContext, PassParams, PipelineError
from pipeline.measure.block import run_block
from pipeline.measure.scoring import greedy
from pipeline.measure.workload import Point
from pipeline.runtime import ExecutionSpec, has_cache, load_runner
from pipeline.testing import FakeClock, FakeRunner, FakeStore, tiny_llama


class Note(Pass):
    """Put the seed beside a model."""

    name = "note"
    accepts, produces = frozenset({"torch"}), "torch"
    depends_on = ("seed",)

    class Params(PassParams):
        text: str = ""

    def run(self, artifact: Artifact, params: Params, context: PassContext) -> Artifact:
        context.count_rule("note", 1, 2)
        entry = context.output.file("note.txt", f"{params.text} {context.seed} {sorted(context.inputs)}".encode())
        files = {**artifact.manifest.files, "note.txt": entry}
        return Artifact(artifact.manifest.model_copy(update={"files": files}), artifact.blobs)


def test_time_passes_when_it_is_told_to() -> None:
    clock = FakeClock()
    clock.advance(1.5)
    assert clock() == 1_500_000_000
    with pytest.raises(ValueError, match="backwards"):
        clock.advance(-1)


def test_the_fake_model_writes_by_its_rule_through_prompts_and_single_tokens() -> None:
    runner = FakeRunner(vocab_size=10, step=3)
    assert greedy(runner, (1, 2), 4) == (5, 8, 1, 4)
    assert [method for method, _ in runner.calls] == ["prefill", "decode", "decode", "decode"]
    whole = FakeRunner(vocab_size=10, step=3, has_cache=False)
    assert not has_cache(whole)
    assert greedy(whole, (1, 2), 4) == (5, 8, 1, 4)


def test_whole_passes_and_chunks_give_the_same_logits() -> None:
    runner = FakeRunner()
    tokens = np.array([[1, 2, 3], [4, 5, 6]])
    scored = np.concatenate(list(runner.score(tokens)), axis=1)
    assert scored.shape == (2, 3, 16)
    np.testing.assert_array_equal(scored[:, -1], runner.forward(tokens))
    np.testing.assert_array_equal(scored[:, -1], runner.prefill(tokens))
    assert scored.dtype == np.float32


def test_the_fake_model_refuses_what_a_runner_refuses() -> None:
    runner = FakeRunner(vocab_size=8, max_length=3)
    with pytest.raises(PipelineError, match="prefill first"):
        runner.decode([[1]])
    with pytest.raises(PipelineError, match="0 to 7"):
        runner.prefill([[8]])
    runner.prefill([[1, 2]])
    with pytest.raises(PipelineError, match=r"takes \[1, 1\] tokens, not \[2, 1\]"):
        runner.decode([[1], [2]])
    runner.decode([[3]])
    with pytest.raises(PipelineError, match="room for 0 more"):
        runner.decode([[4]])
    with pytest.raises(PipelineError, match="no key-value cache"):
        FakeRunner(has_cache=False).prefill([[1]])


def test_blocks_are_timed_by_the_fake_clock() -> None:
    clock = FakeClock()
    runner = FakeRunner(clock=clock, seconds=0.25)
    point = Point(kind="decode", batch=1, prompt=2, new_tokens=4)
    seconds = run_block(runner, point, np.ones((1, 6), np.int64), min_s=1.0, steps=4, clock=clock)
    assert seconds == [0.25] * 4


def test_a_pass_is_run_in_a_store_to_throw_away(tmp_path: Path) -> None:
    rules: dict[str, tuple[int, int]] = {}
    with FakeStore() as store:
        model = store.model(tiny_llama(tmp_path))
        made = store.run(Note, model, {"text": "hi"}, facets={"seed": 7}, inputs={"draft": model}, rules=rules)
        assert store.artifact(made.digest) is not None
        note = made.file("note.txt")
        assert note is not None
        assert note.read_text() == "hi 7 ['draft']"
        assert rules == {"note": (1, 2)}
        with pytest.raises(PipelineError, match="note declares seed"):
            store.run(Note, model)
    assert not store.root.exists()
    with FakeStore(tmp_path / "kept") as kept:
        kept.model(tmp_path)
    assert kept.root.exists()


def test_the_small_model_is_the_same_everywhere_and_says_something(tmp_path: Path) -> None:
    one, two, other = tiny_llama(tmp_path / "a"), tiny_llama(tmp_path / "b"), tiny_llama(tmp_path / "c", seed=1)
    weights = [(folder / "model.safetensors").read_bytes() for folder in (one, two, other)]
    assert weights[0] == weights[1] != weights[2]
    with FakeStore(tmp_path / "store") as store:
        runner = load_runner(store.model(one), ExecutionSpec())
        logits = next(runner.score(np.arange(32)[None]))
        assert 0.5 < logits.std() < 2  # what a tolerance is a share of


def test_files_that_are_as_they_should_be_stay_untouched(tmp_path: Path) -> None:
    before = (tiny_llama(tmp_path) / "model.safetensors").stat()
    (tmp_path / "config.json").write_text("{}")
    after = (tiny_llama(tmp_path) / "model.safetensors").stat()
    assert before == after
    assert (tmp_path / "config.json").read_text() != "{}"
