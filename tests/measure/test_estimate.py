import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.measure.estimate import (
    LAUNCH_SD,
    Estimate,
    Seen,
    _median_variance,
    estimate,
    estimates,
    look_at,
)

values = st.floats(-5, 5).map(lambda x: round(x, 6))
launched = st.lists(st.lists(values, min_size=1, max_size=6), min_size=1, max_size=4).filter(
    lambda launches: sum(map(len, launches)) >= 2
)
Launched = list[list[float]]


def seen(launches: Launched, shift: float = 0.0, scale: float = 1.0) -> Seen:
    flat = np.array([[scale * x + shift for launch in launches for x in launch]])
    return look_at(flat, np.repeat(np.arange(len(launches)), [len(launch) for launch in launches]))


def numbers(value: Estimate) -> tuple[float, float, float]:
    return float(value.center[0]), float(value.error[0]), float(value.freedom[0])


def close(a: Estimate, b: Estimate) -> bool:
    return numbers(a) == pytest.approx(numbers(b), rel=1e-6, abs=1e-9)


@given(launched)
@settings(deadline=None)
def test_negated_values_give_the_negated_interval(launches: Launched) -> None:
    center, error, freedom = numbers(estimate(seen(launches)))
    assert numbers(estimate(seen(launches, scale=-1))) == pytest.approx((-center, error, freedom), rel=1e-6, abs=1e-9)


@given(launched, values)
@settings(deadline=None)
def test_a_shift_moves_the_center_alone(launches: Launched, shift: float) -> None:
    center, error, freedom = numbers(estimate(seen(launches)))
    shifted = numbers(estimate(seen(launches, shift=shift)))
    assert shifted[0] == pytest.approx(center + shift, abs=1e-9)
    assert shifted[1:] == pytest.approx((error, freedom), rel=1e-4)


@given(launched, st.floats(0.1, 10))
@settings(deadline=None)
def test_what_is_seen_scales_with_the_values(launches: Launched, scale: float) -> None:
    one, other = seen(launches), seen(launches, scale=scale)
    assert float(other.center[0]) == pytest.approx(scale * float(one.center[0]), rel=1e-6, abs=1e-9)
    for name in ("within", "between", "launch_noise"):
        expected = scale**2 * float(getattr(one, name)[0])
        assert float(getattr(other, name)[0]) == pytest.approx(expected, rel=1e-6, abs=1e-6)


@given(launched, st.randoms(use_true_random=False))
@settings(deadline=None)
def test_the_order_of_rounds_and_launches_does_not_matter(launches: Launched, draw: object) -> None:
    mixed = [list(launch) for launch in launches]
    draw.shuffle(mixed)  # type: ignore[attr-defined]
    for launch in mixed:
        draw.shuffle(launch)  # type: ignore[attr-defined]
    assert close(estimate(seen(launches)), estimate(seen(mixed)))


@given(st.lists(launched, min_size=2, max_size=4), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_the_order_of_stages_does_not_matter(stages: list[Launched], draw: object) -> None:
    order = list(range(len(stages)))
    draw.shuffle(order)  # type: ignore[attr-defined]
    found = estimates([seen(s) for s in stages])
    mixed = estimates([seen(stages[i]) for i in order])
    assert all(close(found[i], mixed[place]) for place, i in enumerate(order))


@given(launched)
@settings(deadline=None)
def test_intervals_of_stricter_levels_hold_the_others(launches: Launched) -> None:
    value = estimate(seen(launches))
    widths = [float(value.half_width(alpha)[0]) for alpha in (0.5, 0.05, 0.01, 0.001)]
    assert widths == sorted(widths)
    assert widths[0] > 0


def test_trials_side_by_side_are_what_each_is_alone() -> None:
    draw = np.random.default_rng(0)
    trials = draw.normal(size=(5, 12))
    launches = np.repeat([0, 1, 2], 4)
    together = estimate(look_at(trials, launches))
    for i, row in enumerate(trials):
        alone = estimate(look_at(row[None], launches))
        assert numbers(alone) == pytest.approx((together.center[i], together.error[i], together.freedom[i]))


def test_one_round_is_refused() -> None:
    with pytest.raises(ValueError, match="one round"):
        seen([[1.0]])


def test_with_one_launch_the_assumed_launches_still_widen_the_interval() -> None:
    quiet = estimate(seen([[0.0] * 50]))
    assert float(quiet.error[0]) == pytest.approx(math.sqrt(2) * LAUNCH_SD)
    assert float(quiet.half_width()[0]) > 0.02


def test_more_launches_of_the_same_noise_narrow_the_interval_more_than_more_rounds() -> None:
    draw = np.random.default_rng(1)
    effects = 0.01 * draw.standard_normal(12)
    few, many = (
        [[e + 0.001 * x for x in draw.standard_normal(n)] for e in effects[:k]] for k, n in ((3, 40), (12, 10))
    )
    assert float(estimate(seen(many)).half_width()[0]) < float(estimate(seen(few)).half_width()[0])


def test_an_outlier_changes_neither_center_nor_error_much() -> None:
    draw = np.random.default_rng(2)
    launches = [list(0.01 * draw.standard_normal(10)) for _ in range(3)]
    clean = estimate(seen(launches))
    launches[1][4] = 3.0
    spoilt = estimate(seen(launches))
    assert abs(float(spoilt.center[0] - clean.center[0])) < 0.003
    assert float(spoilt.error[0]) < 1.5 * float(clean.error[0])


def launches_of_sd(sd: float, draw: np.random.Generator, count: int = 10) -> Launched:
    effects = sd * draw.standard_normal(count)
    return [list(effect + 0.002 * draw.standard_normal(8)) for effect in effects]


def test_quiet_stages_steady_one_that_is_like_them_but_not_one_whose_launches_vary_far_more() -> None:
    draw = np.random.default_rng(3)
    others = [seen(launches_of_sd(0.002, draw)) for _ in range(5)]
    like, wild = seen(launches_of_sd(0.002, draw)), seen(launches_of_sd(0.03, draw))
    assert numbers(estimate(like, others))[2] > 1.2 * numbers(estimate(like))[2]
    assert numbers(estimate(wild, others)) == pytest.approx(numbers(estimate(wild)), rel=0.02)


@pytest.mark.parametrize("count", range(1, 13))
def test_the_variance_of_a_small_median_is_the_simulated_one(count: int) -> None:
    medians = np.median(np.random.default_rng(count).standard_normal((100_000, count)), axis=1)
    assert float(_median_variance(np.array([count]))[0]) == pytest.approx(float(medians.var()), rel=0.05)
