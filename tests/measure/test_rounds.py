"""Blocks of a round: every process gets its time in visits that take turns."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.measure.budget import BLOCK_S, VISIT_S
from pipeline.measure.rounds import run_blocks
from pipeline.measure.workload import Point

PREFILL = Point(kind="prefill", batch=1, prompt=8, new_tokens=0)


@dataclass
class FakeLauncher:
    """Answers with visits of iterations that take `iteration_s` by name; `fails` gives the visit that fails, from 0."""

    iteration_s: dict[str, float]
    fails: dict[str, int] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    random: random.Random = field(default_factory=lambda: random.Random(0))  # noqa: S311

    def shuffled(self, items: Any) -> list[Any]:
        drawn = list(items)
        self.random.shuffle(drawn)
        return drawn

    def ask(self, crew: Any, seat: Any, request: str, point: Point, **fields: Any) -> dict[str, Any] | None:
        name = seat.stage.name
        if self.asked.count(name) == self.fails.get(name, -1):
            del crew.workers[seat]
            return None
        self.asked.append(name)
        each = self.iteration_s[name]
        return {"seconds": [each] * math.ceil(fields["min_s"] / each - 1e-9)}


@dataclass(frozen=True)
class FakeSeat:
    stage: Any
    replica: int = 0


@dataclass(frozen=True)
class FakeStage:
    name: str


def blocks_of(launcher: FakeLauncher, *names: str) -> dict[str, Any]:
    crew: Any = SimpleNamespace(workers={FakeSeat(FakeStage(name)): None for name in names})
    clock = iter(range(1000)).__next__
    blocks = run_blocks(launcher, crew, PREFILL, steps=0, clock=clock)  # type: ignore[arg-type]
    return {block.seat.stage.name: block for block in blocks}


def test_short_work_is_visited_until_a_block_is_full_and_long_work_once() -> None:
    blocks = blocks_of(FakeLauncher({"short": 0.01, "long": 0.5}), "short", "long")
    assert [len(visit) for visit in blocks["short"].visits] == [5, 5, 5, 5]
    assert blocks["long"].visits == [(0.5,)]
    assert all(block.timed_s >= BLOCK_S - 1e-9 for block in blocks.values())


def test_nobody_is_visited_twice_before_all_who_need_time_were_visited() -> None:
    launcher = FakeLauncher({"a": 0.01, "b": 0.02, "c": 0.05})
    blocks_of(launcher, "a", "b", "c")
    turns = [launcher.asked[begin : begin + 3] for begin in range(0, len(launcher.asked), 3)]
    assert all(set(turn) == {"a", "b", "c"} for turn in turns[:3])
    assert len({tuple(turn) for turn in turns}) > 1  # the order is drawn anew


def test_a_process_that_fails_on_the_way_has_no_block_and_the_others_have_theirs() -> None:
    blocks = blocks_of(FakeLauncher({"a": 0.01, "b": 0.01}, fails={"b": 2}), "a", "b")
    assert list(blocks) == ["a"]
    assert blocks["a"].timed_s == pytest.approx(BLOCK_S)


def test_a_sample_has_every_iteration_and_says_where_visits_ended() -> None:
    block = blocks_of(FakeLauncher({"a": 0.03}), "a")["a"]
    sample = block.sample(launch=1, round=2, order=3)
    assert len(sample.seconds) == sum(sample.visits)
    assert sample.visits == (2,) * 4
    assert sample.latency_s == pytest.approx(0.03)
    assert (sample.launch, sample.round, sample.order, sample.replica) == (1, 2, 3, 0)
    assert VISIT_S <= 2 * 0.03
