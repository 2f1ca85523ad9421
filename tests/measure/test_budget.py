import pytest

from pipeline.measure.budget import BLOCK_S, LEAST_STEPS, decode_steps, round_seconds
from pipeline.measure.workload import Point

PREFILL = Point(kind="prefill", batch=1, prompt=8, new_tokens=0)
DECODE = Point(kind="decode", batch=1, prompt=8, new_tokens=64)
FORWARD = Point(kind="forward", batch=2, prompt=8, new_tokens=0)


def test_all_tokens_are_decoded_where_the_slowest_process_is_fast_enough() -> None:
    assert decode_steps([PREFILL, DECODE], {("a", DECODE): 0.001, ("b", DECODE): 0.002}, 60) == {DECODE: 64}


def test_the_slowest_process_says_how_many_tokens_all_decode() -> None:
    steps = decode_steps([DECODE], {("a", DECODE): 0.001, ("b", DECODE): 0.5}, 60)
    assert steps == {DECODE: 10}  # a half of 60 s, for 3 rounds of 2 processes


def test_however_slow_some_tokens_are_decoded() -> None:
    assert decode_steps([DECODE], {("a", DECODE): 100.0}, 1) == {DECODE: LEAST_STEPS}
    few = DECODE.model_copy(update={"new_tokens": 2})
    assert decode_steps([few], {("a", few): 100.0}, 1) == {few: 2}


def test_prompts_and_whole_passes_decode_nothing() -> None:
    assert decode_steps([PREFILL, FORWARD], {("a", PREFILL): 1.0, ("a", FORWARD): 1.0}, 60) == {PREFILL: 0, FORWARD: 0}


def test_a_point_at_which_nothing_was_seen_is_left_out() -> None:
    assert decode_steps([PREFILL, DECODE], {("a", PREFILL): 1.0}, 60) == {PREFILL: 0}


@pytest.mark.parametrize("point", [PREFILL, FORWARD])
def test_a_slow_prompt_runs_twice_once_untimed(point: Point) -> None:
    assert round_seconds({("a", point): 0.9}, {point: 0}) == pytest.approx(1.8)


@pytest.mark.parametrize("point", [PREFILL, FORWARD])
def test_a_very_slow_prompt_is_timed_at_once(point: Point) -> None:
    assert round_seconds({("a", point): 3.0}, {point: 0}) == pytest.approx(3.0)


def test_fast_prompts_fill_a_block() -> None:
    assert round_seconds({("a", PREFILL): 0.001}, {PREFILL: 0}) == pytest.approx(BLOCK_S, rel=0.03)


def test_every_prompt_before_decoded_tokens_counts() -> None:
    estimates = {("a", PREFILL): 0.1, ("a", DECODE): 0.001}
    alone = round_seconds({("a", PREFILL): 0.1}, {PREFILL: 0})
    cycles = 4  # of 64 ms each, for 200 ms
    assert round_seconds(estimates, {PREFILL: 0, DECODE: 64}) == pytest.approx(alone + cycles * (0.064 + 0.1))


def test_processes_add_up() -> None:
    one, two = {("a", FORWARD): 3.0}, {("a", FORWARD): 3.0, ("b", FORWARD): 0.5}
    assert round_seconds(two, {FORWARD: 0}) == pytest.approx(round_seconds(one, {FORWARD: 0}) + 1.0)
