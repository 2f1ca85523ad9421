from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from pipeline.errors import PipelineError, StageError
from pipeline.measure.block import is_flat, run_block, warm_up
from pipeline.measure.workload import Point, Workload, fixed_tokens
from pipeline.recipe import schema

PREFILL = Point(kind="prefill", batch=2, prompt=4, new_tokens=0)
FORWARD = Point(kind="forward", batch=2, prompt=4, new_tokens=0)
DECODE = Point(kind="decode", batch=2, prompt=4, new_tokens=3)


class FakeRunner:
    """Takes a second for each token, and remembers its calls."""

    version = "1"
    vocab_size = 10
    max_length = 100
    has_cache = True

    def __init__(self, speeds: list[float] | None = None) -> None:
        self.now_ns = 0
        self.calls: list[str] = []
        self.tokens: list[list[int]] = []
        self.speeds = speeds or []

    def prefill(self, tokens: np.ndarray) -> np.ndarray:
        return self._call("prefill", tokens)

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        return self._call("decode", tokens)

    def forward(self, tokens: np.ndarray) -> np.ndarray:
        return self._call("forward", tokens)

    def score(self, tokens: np.ndarray) -> Iterator[np.ndarray]:
        raise NotImplementedError

    def reset(self) -> None:
        pass

    def clock(self) -> int:
        return self.now_ns

    def _call(self, name: str, tokens: np.ndarray) -> np.ndarray:
        self.calls.append(name)
        self.tokens.append(tokens[0].tolist())
        each = self.speeds.pop(0) if self.speeds else 1.0
        self.now_ns += int(tokens.shape[1] * each * 1e9)
        return np.zeros((len(tokens), self.vocab_size), np.float32)


class CompilingRunner(FakeRunner):
    """Compiles, for a hundred seconds, in the calls with these numbers."""

    def __init__(self, calls: set[int]) -> None:
        super().__init__()
        self.compiling = calls
        self.compilations = 0

    def _call(self, name: str, tokens: np.ndarray) -> np.ndarray:
        if len(self.calls) in self.compiling:
            self.compilations += 1
            self.now_ns += 100 * 10**9
        return super()._call(name, tokens)


def tokens_of(point: Point) -> np.ndarray:
    return fixed_tokens(point, vocab_size=10, seed=0)


def test_a_prefill_block_times_whole_prompts_after_one_that_is_not_timed() -> None:
    runner = FakeRunner()
    assert run_block(runner, PREFILL, tokens_of(PREFILL), min_s=8, steps=3, clock=runner.clock) == [4.0, 4.0]
    assert runner.calls == ["prefill"] * 3


def test_a_decode_block_times_tokens_and_not_the_prompt() -> None:
    runner = FakeRunner()
    assert run_block(runner, DECODE, tokens_of(DECODE), min_s=1, steps=3, clock=runner.clock) == [1.0, 1.0, 1.0]
    assert runner.calls == ["prefill", "decode", "decode", "decode"]


def test_a_forward_block_times_whole_passes_and_asks_for_nothing_else() -> None:
    runner = FakeRunner()
    assert run_block(runner, FORWARD, tokens_of(FORWARD), min_s=8, steps=0, clock=runner.clock) == [4.0, 4.0]
    assert runner.calls == ["forward"] * 3


@pytest.mark.parametrize(("expected_s", "untimed"), [(0.9, 1), (1.0, 0)])
def test_long_passes_are_timed_from_the_first_on(expected_s: float, untimed: int) -> None:
    runner = FakeRunner()
    how = {"min_s": 8.0, "expected_s": expected_s}
    assert run_block(runner, FORWARD, tokens_of(FORWARD), steps=0, clock=runner.clock, **how) == [4.0, 4.0]  # type: ignore[arg-type]
    assert len(runner.calls) == 2 + untimed


def test_however_long_a_prompt_is_it_comes_before_the_tokens_that_are_decoded() -> None:
    runner = FakeRunner()
    run_block(runner, DECODE, tokens_of(DECODE), min_s=1, steps=3, expected_s=5.0, clock=runner.clock)
    assert runner.calls == ["prefill", "decode", "decode", "decode"]


def test_a_warm_up_of_whole_passes_ends_when_they_are_flat() -> None:
    runner = FakeRunner()
    assert warm_up(runner, FORWARD, tokens_of(FORWARD), cap_s=60, steps=0, clock=runner.clock).flat
    assert set(runner.calls) == {"forward"}


def test_a_runner_that_knows_no_whole_passes_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(FakeRunner, "forward")
    with pytest.raises(PipelineError, match="does not know whole passes"):
        run_block(FakeRunner(), FORWARD, tokens_of(FORWARD), min_s=1, steps=0)


def test_a_decode_block_ends_after_whole_continuations_only() -> None:
    runner = FakeRunner()
    assert len(run_block(runner, DECODE, tokens_of(DECODE), min_s=4, steps=3, clock=runner.clock)) == 6
    assert runner.calls == (["prefill"] + ["decode"] * 3) * 2


def test_the_tokens_fed_are_the_given_ones_whatever_the_model_says() -> None:
    runner = FakeRunner()
    tokens = tokens_of(DECODE)
    run_block(runner, DECODE, tokens, min_s=1, steps=3, clock=runner.clock)
    assert [token for call in runner.tokens for token in call] == tokens[0].tolist()


@pytest.mark.parametrize("call", [0, 1, 3])
def test_a_block_in_which_the_runner_compiled_is_done_again(call: int) -> None:
    runner = CompilingRunner({call})
    assert run_block(runner, DECODE, tokens_of(DECODE), min_s=1, steps=3, clock=runner.clock) == [1.0] * 3
    assert runner.calls == (["prefill"] + ["decode"] * 3) * 2


def test_compiling_neither_ends_a_warm_up_nor_counts_in_it() -> None:
    runner = CompilingRunner({2, 5})
    seen = warm_up(runner, PREFILL, tokens_of(PREFILL), cap_s=60, steps=3, clock=runner.clock)
    assert seen.flat
    assert seen.seconds == [4.0] * 6
    assert len(runner.calls) == 12


def test_a_runner_that_compiles_in_every_block_fails_and_does_not_go_on_for_ever() -> None:
    runner = CompilingRunner(set(range(10**4)))
    with pytest.raises(StageError, match="compiled something anew in 5 timed blocks") as caught:
        run_block(runner, DECODE, tokens_of(DECODE), min_s=1, steps=3, clock=runner.clock)
    assert "pad" in str(caught.value.hint)


def test_a_runner_that_compiles_in_every_iteration_of_a_warm_up_fails() -> None:
    runner = CompilingRunner(set(range(10**4)))
    with pytest.raises(StageError, match="compiled something anew in 8 iterations of its warm-up"):
        warm_up(runner, DECODE, tokens_of(DECODE), cap_s=60, steps=3, clock=runner.clock)


def test_a_runner_that_compiles_once_for_every_position_is_warmed_up() -> None:
    positions = 100
    runner = CompilingRunner(set(range(1 + positions)))
    long = DECODE.model_copy(update={"new_tokens": positions})
    assert warm_up(runner, long, tokens_of(long), cap_s=60, steps=positions, clock=runner.clock).flat


def test_a_warm_up_ends_when_times_are_flat() -> None:
    runner = FakeRunner(speeds=[9, 9, 5, 3, 2, 1])
    seen = warm_up(runner, PREFILL, tokens_of(PREFILL), cap_s=1e9, steps=3, clock=runner.clock)
    assert seen.flat
    assert len(seen.seconds) > 6
    assert is_flat(seen.seconds)


def test_a_warm_up_that_never_gets_flat_ends_at_its_cap() -> None:
    runner = FakeRunner(speeds=[2.0**i for i in range(50)])
    seen = warm_up(runner, PREFILL, tokens_of(PREFILL), cap_s=100, steps=3, clock=runner.clock)
    assert not seen.flat
    assert sum(seen.seconds[:-1]) < 100 <= sum(seen.seconds) + 4


def test_a_warm_up_of_a_very_slow_model_has_two_iterations() -> None:
    runner = FakeRunner(speeds=[1e6] * 9)
    assert len(warm_up(runner, PREFILL, tokens_of(PREFILL), cap_s=1, steps=3, clock=runner.clock).seconds) == 2


@pytest.mark.parametrize(
    ("seconds", "flat"),
    [([1.0] * 6, True), ([1.0] * 5, False), ([5, 5, 2, 2, 1, 1], False), ([9, 9, 1, 1.02, 1.01, 1.02], True)],
)
def test_flat_means_that_the_last_two_thirds_agree(seconds: list[float], flat: bool) -> None:
    assert is_flat(seconds) is flat


def test_the_same_seed_gives_every_stage_the_same_tokens() -> None:
    np.testing.assert_array_equal(tokens_of(DECODE), tokens_of(DECODE))
    assert not np.array_equal(tokens_of(DECODE), fixed_tokens(DECODE, vocab_size=10, seed=1))
    assert tokens_of(DECODE).shape == (2, 7)


def test_prefill_and_decode_get_the_same_prompt() -> None:
    np.testing.assert_array_equal(tokens_of(PREFILL), tokens_of(DECODE)[:, : PREFILL.prompt])


def test_a_workload_has_prefill_for_each_batch_and_prompt_and_decode_for_each_number_of_new_tokens() -> None:
    points = list(Workload(prompt_lengths=(8, 16), batch_sizes=(1, 4), new_tokens=(5, 9)).points())
    assert len(points) == len(set(points)) == 12
    assert {(p.kind, p.batch, p.prompt, p.new_tokens) for p in points} == {
        (kind, batch, prompt, new)
        for kind, new in (("prefill", 0), ("decode", 5), ("decode", 9))
        for batch in (1, 4)
        for prompt in (8, 16)
    }


@pytest.mark.parametrize(
    ("recipe", "workload"),
    [
        ({}, Workload()),
        (
            {"prompt_lengths": [8, 16], "new_tokens": 5, "batch_sizes": [2]},
            Workload(prompt_lengths=(8, 16), new_tokens=(5,), batch_sizes=(2,)),
        ),
        ({"new_tokens": [5, 9]}, Workload(new_tokens=(5, 9))),
        ({"forward": [[2, 1024]]}, Workload(forward=((2, 1024),))),
    ],
)
def test_a_recipes_workload_is_taken_as_it_is_written(recipe: dict[str, Any], workload: Workload) -> None:
    assert Workload.of(schema.Workload.model_validate(recipe)) == workload


def test_a_workload_of_whole_passes_has_nothing_else() -> None:
    points = list(Workload(forward=((2, 1024), (1, 16))).points())
    assert [(p.kind, p.batch, p.prompt) for p in points] == [("forward", 2, 1024), ("forward", 1, 16)]
    assert points[0].tokens_per_iteration == 2048
