"""Timed blocks of inference, as they run inside a worker."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from pipeline.errors import PipelineError, StageError
from pipeline.measure.workload import Point
from pipeline.runtime import CausalLMRunner

if TYPE_CHECKING:
    import numpy as np

FLAT = 0.03
"""A warm-up is over when the medians of its last two thirds differ by no more than this share."""

LONG_S = 1.0
"""Prompts and passes that take so long are timed from a block's first on. Filling the processor's caches anew, after
another stage had them, takes a millisecond: no part of such a pass that could be told from noise."""

LEAST_ITERATIONS = 6
LEAST_WARM_UP_S = 0.2
"""Iterations and seconds before flatness is judged."""

TRIES = 5
"""Blocks of the same work in which something was compiled. The first of them met every shape that there is."""

Clock = Callable[[], int]
"""Nanoseconds, monotonic."""


class WarmUp(NamedTuple):
    """What a warm-up saw: seconds of each iteration, and whether they were flat before the cap."""

    seconds: list[float]
    flat: bool


def run_block(
    runner: CausalLMRunner,
    point: Point,
    tokens: np.ndarray,
    *,
    min_s: float,
    steps: int,
    expected_s: float = 0.0,
    clock: Clock = time.perf_counter_ns,
) -> list[float]:
    """Seconds of each iteration of one block that takes at least `min_s` of timed work.

    `tokens` are [B, prompt + new_tokens]. An iteration of prefill or forward is one whole prompt or pass, after one
    that is not timed, as another stage used the caches meanwhile; where `expected_s`, what the warm-up saw, is LONG_S
    or more, the first counts. An iteration of decode is one token; after each
    prompt, which is not timed, exactly `steps` tokens follow, so that every stage decodes at the same positions. A
    block in which the runner compiled something counts for nothing and is done again.

    Raises: StageError where it compiles in TRIES blocks one after the other, so that there is nothing to time.
    """
    for _ in range(TRIES):
        before = _compilations(runner)
        with _no_garbage_collection():
            iterations = _iterations(runner, point, tokens, steps, clock, untimed_first=expected_s < LONG_S)
            seconds = _block(iterations, point, min_s=min_s, steps=steps)
        if _compilations(runner) == before:
            return seconds
    raise _never_ends_compiling(f"in {TRIES} timed blocks of the same work")


def _block(iterations: Iterator[float], point: Point, *, min_s: float, steps: int) -> list[float]:
    seconds: list[float] = []
    total = 0.0
    for took in iterations:
        seconds.append(took)
        total += took
        complete = point.kind != "decode" or len(seconds) % steps == 0
        if complete and total >= min_s:
            return seconds
    raise AssertionError("iterations do not end")


def warm_up(
    runner: CausalLMRunner,
    point: Point,
    tokens: np.ndarray,
    *,
    cap_s: float,
    steps: int,
    clock: Clock = time.perf_counter_ns,
) -> WarmUp:
    """Run iterations until their times are flat, or `cap_s` has passed and there were at least two.

    It begins anew after an iteration in which the runner compiled something: that may be once for each decoded
    position, and a few times more.

    Raises: StageError where it goes on compiling.
    """
    tries = steps + TRIES
    begin = clock()
    seconds: list[float] = []
    total = 0.0
    compiled = _compilations(runner)
    for took in _iterations(runner, point, tokens, steps, clock):
        if _compilations(runner) != compiled:
            tries -= 1
            if not tries:
                raise _never_ends_compiling(f"in {steps + TRIES} iterations of its warm-up")
            compiled = _compilations(runner)
            begin, seconds, total = clock(), [], 0.0
            continue
        seconds.append(took)
        total += took
        if total >= min(LEAST_WARM_UP_S, cap_s) and is_flat(seconds):
            return WarmUp(seconds, True)
        if len(seconds) >= 2 and (clock() - begin) / 1e9 >= cap_s:
            break
    return WarmUp(seconds, False)


def is_flat(seconds: Sequence[float]) -> bool:
    """Whether the medians of the last third and of the third before it differ by at most FLAT."""
    if len(seconds) < LEAST_ITERATIONS:
        return False
    third = len(seconds) // 3
    last, before = statistics.median(seconds[-third:]), statistics.median(seconds[-2 * third : -third])
    return abs(last - before) <= FLAT * before


def _compilations(runner: CausalLMRunner) -> int:
    """How much the runner has compiled so far, where it is one that does so while it runs."""
    return int(getattr(runner, "compilations", 0))


def _never_ends_compiling(where: str) -> StageError:
    return StageError(
        f"the runner compiled something anew {where}: what it takes is compiling, and no inference",
        hint="a runner whose code depends on the length compiles for each; have it pad, or compile with dynamic shapes",
    )


def _iterations(
    runner: CausalLMRunner,
    point: Point,
    tokens: np.ndarray,
    steps: int,
    clock: Clock,
    *,
    untimed_first: bool = True,
) -> Iterator[float]:
    """Seconds of one timed iteration after another, for ever. Runners return when the device is done."""
    prompt = tokens[:, : point.prompt]
    whole = _whole_passes(runner) if point.kind == "forward" else runner.prefill
    if untimed_first or point.kind == "decode":
        whole(prompt)
    while point.kind != "decode":
        begin = clock()
        whole(prompt)
        yield (clock() - begin) / 1e9
    while True:
        for step in range(steps):
            token = tokens[:, point.prompt + step : point.prompt + step + 1]
            begin = clock()
            runner.decode(token)
            yield (clock() - begin) / 1e9
        runner.prefill(prompt)


def _whole_passes(runner: CausalLMRunner) -> Callable[[np.ndarray], np.ndarray]:
    """Raises: PipelineError where the runner, a stranger's, has no `forward`."""
    forward: Callable[[np.ndarray], np.ndarray] | None = getattr(runner, "forward", None)
    if forward is None:
        raise PipelineError(
            "the runner of its format does not know whole passes",
            hint="measure it with evaluate.workload.prompt_lengths and new_tokens",
        )
    return forward


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
