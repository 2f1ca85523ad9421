"""The blocks of a round at one point: every process gets its time in short visits, and they take turns.

A shared machine is fast for a second and slow for the next. A block in one piece meets one of the two; blocks that are
made of visits in turn meet the same moments, and their ratio loses most of that noise.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

from pipeline.measure.budget import BLOCK_S, VISIT_S
from pipeline.measure.launches import Crew, Launcher, Seat
from pipeline.measure.samples import Sample
from pipeline.measure.workload import Point


@dataclass
class Block:
    """Seconds of each iteration, visit by visit."""

    seat: Seat
    point: Point
    started_s: float = 0.0
    visits: list[tuple[float, ...]] = field(default_factory=list)

    @property
    def timed_s(self) -> float:
        return sum(map(sum, self.visits))

    def sample(self, *, launch: int, round: int, order: int) -> Sample:
        return Sample(
            stage=self.seat.stage.name,
            replica=self.seat.replica,
            launch=launch,
            round=round,
            order=order,
            point=self.point,
            seconds=tuple(itertools.chain.from_iterable(self.visits)),
            visits=tuple(map(len, self.visits)),
            started_s=self.started_s,
        )


def run_blocks(launcher: Launcher, crew: Crew, point: Point, *, steps: int, clock: Callable[[], float]) -> list[Block]:
    """A block of at least BLOCK_S of timed work of every process, in the order in which they began.

    Visits of at least VISIT_S take turns, in an order drawn anew for each turn, until every process has its time. A
    process that fails on the way has no block.
    """
    blocks = [Block(seat, point) for seat in launcher.shuffled(crew.workers)]
    turn = blocks
    while turn:
        for block in turn:
            if not block.visits:
                block.started_s = clock()
            answer = launcher.ask(crew, block.seat, "block", point, steps=steps, min_s=VISIT_S)
            if answer is not None:
                block.visits.append(tuple(answer["seconds"]))
        turn = launcher.shuffled(b for b in turn if b.seat in crew.workers and b.timed_s < BLOCK_S)
    return [block for block in blocks if block.seat in crew.workers]
