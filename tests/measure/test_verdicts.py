import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipeline.measure.estimate import Estimate
from pipeline.measure.verdicts import CLAIMS, holm, noise_floor, rounds_to_decide, strictest, verdict, verdicts

EDGE = math.log1p(0.01)


def of(center: float, error: float = 0.001, freedom: float = 30.0) -> Estimate:
    return Estimate(*(np.array([x]) for x in (center, error, freedom)))


def says(value: Estimate, floor: float = 0.0, *, margin: float = 0.01, alpha: float = 0.05) -> str:
    claims, _ = verdicts([value], [np.array([floor])], margin=margin, alpha=alpha)
    return CLAIMS[int(claims[0, 0])]


measured = st.builds(of, st.floats(-0.1, 0.1), st.floats(1e-5, 0.05), st.floats(1, 100))
floors = st.floats(0, 0.05)


@pytest.mark.parametrize(
    ("low", "high", "floor", "expected"),
    [
        (1.02, 1.05, (0.999, 1.001), "faster"),
        (0.90, 0.98, (0.999, 1.001), "slower"),
        (0.995, 1.005, (0.999, 1.001), "equivalent"),
        (0.995, 1.02, (0.999, 1.001), "inconclusive"),
        (1.005, 1.02, (0.999, 1.001), "inconclusive"),
        (1.02, 1.05, (0.97, 1.03), "inconclusive"),
        (1.02, 1.05, (0.97, 0.99), "inconclusive"),
        (1.04, 1.05, (0.97, 0.99), "faster"),
        (0.995, 1.005, (0.97, 1.03), "inconclusive"),
        (0.5, 2.0, (1.0, 1.0), "inconclusive"),
    ],
)
def test_a_claim_needs_the_interval_beyond_the_margin_and_the_noise(
    low: float, high: float, floor: tuple[float, float], expected: str
) -> None:
    assert verdict(low, high, floor=floor) == expected
    center, half = (math.log(high) + math.log(low)) / 2, (math.log(high) - math.log(low)) / 2
    value = of(center, half / float(of(0, 1).half_width()[0]))
    assert says(value, max(abs(math.log(end)) for end in floor)) == expected


@given(measured, floors, st.floats(0.001, 0.05))
@settings(deadline=None)
def test_a_verdict_never_contradicts_the_printed_interval(value: Estimate, floor: float, alpha: float) -> None:
    low, high = (math.exp(float(value.center[0]) + s * float(value.half_width()[0])) for s in (-1, 1))
    found = says(value, floor, alpha=alpha)
    printed = verdict(low, high, floor=(math.exp(-floor), math.exp(floor)))
    assert found in {"inconclusive", printed}


@given(measured, floors)
@settings(deadline=None)
def test_the_verdict_the_other_way_round_is_the_opposite(value: Estimate, floor: float) -> None:
    mirrored = Estimate(-value.center, value.error, value.freedom)
    opposite = {"faster": "slower", "slower": "faster"}
    assert says(mirrored, floor) == opposite.get(says(value, floor), says(value, floor))


@given(measured, floors, st.floats(0.001, 0.05), st.floats(0.001, 0.05))
@settings(deadline=None)
def test_a_wider_margin_never_makes_faster_of_equivalent(value: Estimate, floor: float, a: float, b: float) -> None:
    narrow, wide = (says(value, floor, margin=m) for m in sorted((a, b)))
    if narrow == "equivalent":
        assert wide == "equivalent"
    if wide in {"faster", "slower"}:
        assert narrow == wide


@given(measured, floors, floors)
@settings(deadline=None)
def test_more_noise_of_the_baseline_never_makes_a_claim(value: Estimate, a: float, b: float) -> None:
    quiet, loud = (says(value, floor) for floor in sorted((a, b)))
    assert loud in {quiet, "inconclusive"}


@given(measured, floors, st.floats(1e-6, 0.05), st.floats(1e-6, 0.05))
@settings(deadline=None)
def test_a_stricter_level_claims_the_same_or_nothing(value: Estimate, floor: float, a: float, b: float) -> None:
    strict, lenient = (says(value, floor, alpha=alpha) for alpha in sorted((a, b)))
    assert strict in {lenient, "inconclusive"}


@given(st.lists(st.tuples(measured, floors), min_size=1, max_size=6), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_the_order_of_comparisons_does_not_matter(table: list[tuple[Estimate, float]], draw: object) -> None:
    order = list(range(len(table)))
    draw.shuffle(order)  # type: ignore[attr-defined]

    def claims(rows: list[tuple[Estimate, float]]) -> list[int]:
        found, _ = verdicts([e for e, _ in rows], [np.array([f]) for _, f in rows], margin=0.01, alpha=0.0125)
        return [int(c[0]) for c in found]

    assert claims([table[i] for i in order]) == [claims(table)[i] for i in order]


@given(measured, floors, st.lists(st.tuples(measured, floors), max_size=5))
@settings(deadline=None)
def test_more_comparisons_never_add_a_claim(value: Estimate, floor: float, more: list[tuple[Estimate, float]]) -> None:
    rows = [(value, floor), *more]
    claims, _ = verdicts([e for e, _ in rows], [np.array([f]) for _, f in rows], margin=0.01, alpha=0.05)
    assert CLAIMS[int(claims[0, 0])] in {says(value, floor), "inconclusive"}


@pytest.mark.parametrize(
    ("levels", "held"),
    [
        ([0.01, 0.02, 0.04], [True, True, True]),
        ([0.04, 0.02, 0.01], [True, True, True]),
        ([0.01, 0.03, 0.03], [True, False, False]),
        ([0.017, 0.001, 0.001], [True, True, True]),
        ([0.017, 0.017, 0.017], [False, False, False]),
        ([0.06], [False]),
    ],
)
def test_holm_divides_the_level_by_what_is_left(levels: list[float], held: list[bool]) -> None:
    assert holm(np.array(levels)[:, None], 0.05)[:, 0].tolist() == held


def test_nothing_is_claimed_where_the_noise_is_not_known() -> None:
    assert says(of(0.5), math.inf) == "inconclusive"
    assert says(of(0.0), math.inf) == "inconclusive"


def test_the_noise_floor_is_the_far_end_of_the_interval_of_equals() -> None:
    again = of(-0.004, 0.001)
    assert float(noise_floor(again)[0]) == pytest.approx(0.004 + float(again.half_width()[0]))


@given(st.floats(-0.1, 0.1), st.floats(0.001, 0.05), st.floats(-0.004, 0.004), st.integers(3, 300))
@settings(deadline=None, max_examples=50)
def test_the_number_of_rounds_that_would_decide_does_and_far_fewer_would_not(
    center: float, error: float, same: float, rounds: int
) -> None:
    pair, again = of(center, error), of(same, error)
    assume(says(pair, float(noise_floor(again)[0])) == "inconclusive")
    needed = rounds_to_decide(pair, again, rounds=rounds, margin=0.01, alpha=0.05)
    assume(needed is not None)
    assert needed is not None
    assert needed > rounds

    def decided(count: float) -> bool:
        more = count / rounds
        later, floor = (Estimate(e.center, e.error / math.sqrt(more), e.freedom * more) for e in (pair, again))
        return says(later, float(noise_floor(floor)[0])) != "inconclusive"

    assert decided(needed)
    assert not decided(max(rounds, 0.97 * needed - 2))


@pytest.mark.parametrize(("center", "same"), [(EDGE, 0.0), (0.02, 0.03), (0.0, 0.02)])
def test_no_number_of_rounds_decides_what_lies_on_the_margin_or_under_the_noise(center: float, same: float) -> None:
    assert rounds_to_decide(of(center, 0.01), of(same, 0.01), rounds=12, margin=0.01, alpha=0.05) is None


def test_the_strictest_level_is_that_whose_interval_touches_the_bar() -> None:
    value = of(0.02)
    claim, level = strictest(value, np.array([0.0]), margin=0.01)
    assert CLAIMS[int(claim[0])] == "faster"
    assert float(value.half_width(float(level[0]))[0]) == pytest.approx(0.02 - EDGE, rel=1e-6)
