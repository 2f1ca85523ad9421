"""What a round takes, foretold from the warm-up, so that the plan is made before the first timed block."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

from pipeline.measure.block import LONG_S
from pipeline.measure.looks import LEAST_ROUNDS
from pipeline.measure.workload import Point

BLOCK_S = 0.2
VISIT_S = 0.05
"""A block is made of visits that take at least so long, between which the others of the round run: a machine that is
slow for a second is then slow for all of them."""

LEAST_STEPS = 4
"""Fewer decoded tokens after a prompt say little of what a token takes."""

_Process = TypeVar("_Process", bound=Hashable)
Estimates = Mapping[tuple[_Process, Point], float]
"""Seconds of an iteration of a process at a point."""


def decode_steps(points: Sequence[Point], estimates: Estimates[_Process], budget_s: float) -> dict[Point, int]:
    """How many tokens every stage decodes after a prompt: all, or what the slowest can in its share of the budget.

    A point at which nothing was seen has none; prefill and whole passes decode nothing.
    """
    processes = len({process for process, _ in estimates}) or 1
    share_s = max(BLOCK_S, 0.5 * budget_s / (LEAST_ROUNDS * processes * max(1, len(points))))
    steps = {}
    for point in points:
        slowest = max((seconds for (_, at), seconds in estimates.items() if at == point), default=None)
        if slowest is None:
            continue
        fitting = int(share_s / slowest) if slowest > 0 else point.new_tokens
        steps[point] = min(point.new_tokens, max(LEAST_STEPS, fitting))
    return steps


def round_seconds(estimates: Estimates[_Process], steps: Mapping[Point, int]) -> float:
    """Seconds that one block of every process at every point takes; the work that is not timed included."""
    total = 0.0
    prompts = {(key, p.batch, p.prompt): seconds for (key, p), seconds in estimates.items() if p.kind == "prefill"}
    for (process, point), iteration_s in estimates.items():
        if point.kind == "decode":
            visits, cycles = _visits(iteration_s * steps[point])
            prompt_s = prompts.get((process, point.batch, point.prompt), 0.0)
            total += visits * cycles * (iteration_s * steps[point] + prompt_s)
        else:
            visits, iterations = _visits(iteration_s)
            untimed = iteration_s < LONG_S  # the first of a visit, unless it is long
            total += visits * iteration_s * (untimed + iterations)
    return max(total, 1e-6)


def _visits(least_s: float) -> tuple[int, int]:
    """(visits of a block, how often each does the least that it can, which takes `least_s`)."""
    least_s = max(least_s, 1e-6)
    times = math.ceil(VISIT_S / least_s)
    return math.ceil(BLOCK_S / (times * least_s)), times
