import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.measure.looks import ALPHA, LEAST_ROUNDS, Look, LookPlan

DECLARED = (12, 30, 80, 200)

declared = st.lists(st.integers(1, 500), min_size=1, max_size=4, unique=True).map(sorted).map(tuple)


def sizes(plan: LookPlan) -> list[tuple[int, int]]:
    return [(look.rounds, look.launches) for look in plan.looks]


@given(declared)
def test_looks_keep_their_rounds_and_share_all_of_alpha(rounds: tuple[int, ...]) -> None:
    plan = LookPlan.declare(rounds)
    assert tuple(look.rounds for look in plan.looks) == rounds
    assert sum(look.alpha for look in plan.looks) == pytest.approx(ALPHA)


def test_a_look_has_about_as_many_launches_as_rounds_in_each() -> None:
    assert sizes(LookPlan.declare(DECLARED)) == [(12, 3), (30, 5), (80, 9), (200, 14)]


@given(declared.filter(lambda rounds: rounds[0] >= 4), st.integers(1, 600), st.integers(1, 40))
def test_every_look_of_a_plan_cut_down_ends_a_launch(rounds: tuple[int, ...], most: int, launches: int) -> None:
    plan = LookPlan.declare(rounds).within(most, launches)
    done = [sum(plan.rounds_by_launch[:count]) for count in range(1, len(plan.rounds_by_launch) + 1)]
    assert [look.rounds for look in plan.looks] == [done[look.launches - 1] for look in plan.looks]
    assert min(plan.rounds_by_launch) >= 1


@given(declared.filter(lambda rounds: rounds[0] >= 4), st.integers(1, 600), st.integers(1, 40))
def test_a_plan_cut_down_fits_and_has_no_more_looks(rounds: tuple[int, ...], most: int, launches: int) -> None:
    before = LookPlan.declare(rounds)
    plan = before.within(most, launches)
    assert plan.looks[-1].rounds <= most
    assert plan.looks[-1].launches <= launches or plan == before
    assert len(plan.looks) <= len(before.looks)
    assert sum(look.alpha for look in plan.looks) == pytest.approx(ALPHA)
    assert plan.margin == before.margin


@given(st.floats(0.1, 1e4), st.floats(0.01, 100), st.floats(0, 100))
def test_a_plan_within_a_budget_takes_no_longer_unless_nothing_fits(
    budget_s: float, round_s: float, launch_s: float
) -> None:
    plan = LookPlan.declare(DECLARED).within_budget(budget_s, round_s=round_s, launch_s=launch_s)
    took = plan.seconds(round_s=round_s, launch_s=launch_s)
    assert took[-1] <= budget_s * (1 + 1e-9) or sizes(plan) == [(LEAST_ROUNDS, 1)]


@given(st.floats(1, 1e3), st.floats(1, 1e3))
def test_a_larger_budget_never_plans_fewer_rounds(budget_s: float, more_s: float) -> None:
    plans = [
        LookPlan.declare(DECLARED).within_budget(b, round_s=1.5, launch_s=6) for b in (budget_s, budget_s + more_s)
    ]
    few, many = (plan.looks[-1] for plan in plans)
    assert many.rounds >= few.rounds or many.launches > few.launches


def test_what_fits_all_is_not_changed() -> None:
    plan = LookPlan.declare(DECLARED, margin=0.02)
    assert plan.within(200, 14) == plan
    assert plan.within_budget(1e6, round_s=1, launch_s=1) == plan


@pytest.mark.parametrize(
    ("rounds", "launches", "left"),
    [
        (1, 1, [(1, 1)]),
        (3, 1, [(3, 1)]),
        (11, 5, [(11, 3)]),
        (25, 9, [(12, 3), (25, 5)]),
        (31, 9, [(12, 3), (30, 5)]),
        (150, 30, [(12, 3), (30, 5), (80, 9), (150, 12)]),
        (100, 3, [(100, 3)]),
        (100, 4, [(100, 4)]),
    ],
)
def test_fewer_looks_or_a_smaller_one_where_less_fits(rounds: int, launches: int, left: list[tuple[int, int]]) -> None:
    assert sizes(LookPlan.declare(DECLARED).within(rounds, launches)) == left


def test_a_lone_look_rather_loses_launches_than_rounds() -> None:
    plan = LookPlan.declare([100])
    assert sizes(plan) == [(100, 10)]
    assert sizes(plan.within_budget(170, round_s=1.5, launch_s=6)) == [(100, 3)]
    assert plan.within_budget(120, round_s=1.5, launch_s=6).looks[0].rounds < 100


def test_launches_go_on_evenly_from_look_to_look() -> None:
    by_launch = LookPlan.declare(DECLARED).rounds_by_launch
    assert by_launch[:5] == (4, 4, 4, 9, 9)
    assert sum(by_launch) == 200
    assert max(by_launch) <= 2 * math.isqrt(200)


@pytest.mark.parametrize("looks", [[(12, 3), (12, 4)], [(12, 3), (30, 3)], [(2, 3)]])
def test_a_plan_that_does_not_grow_is_refused(looks: list[tuple[int, int]]) -> None:
    with pytest.raises(ValidationError):
        LookPlan(looks=tuple(Look(rounds=r, launches=n, alpha=0.01) for r, n in looks))


def test_a_plan_needs_a_look() -> None:
    with pytest.raises(ValidationError):
        LookPlan.declare([])


def test_where_the_first_look_does_not_fit_rounds_come_before_launches() -> None:
    plan = LookPlan.declare((12, 30, 80, 200))
    told = [
        (look.rounds, look.launches)
        for budget_s in (80, 100)
        for look in plan.within_budget(budget_s, round_s=5.0, launch_s=24.0).looks
    ]
    assert told == [(11, 1), (10, 2)]
