import math
import random

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.measure.looks import LookPlan
from pipeline.measure.samples import Sample
from pipeline.measure.statistics import SpeedFigures, SpeedRatio, compare_stages, contrasts, decide, speed_figures
from pipeline.measure.workload import Point

DECODE = Point(kind="decode", batch=2, prompt=8, new_tokens=4)
PREFILL = Point(kind="prefill", batch=2, prompt=8, new_tokens=4)

Times = dict[tuple[str, int], list[list[float]]]


def samples(times: Times, point: Point = DECODE) -> list[Sample]:
    """Samples from (stage, replica) -> launches -> rounds -> seconds of an iteration."""
    return [
        Sample(
            stage=stage,
            replica=replica,
            launch=launch,
            round=number,
            order=0,
            point=point,
            seconds=(each,),
            started_s=0.0,
        )
        for (stage, replica), launches in times.items()
        for launch, rounds in enumerate(launches)
        for number, each in enumerate(rounds)
    ]


def figures(times: Times, **parents: str | None) -> SpeedFigures:
    return speed_figures(samples(times), baseline="source", parents=parents or {"source": None, "int4": "source"})


def ratio(times: Times, **parents: str | None) -> SpeedRatio:
    found = figures(times, **parents).stages["int4"][0].vs_baseline
    assert found is not None
    return found


def noisy(
    speed: float, *, launches: int = 5, rounds: int = 8, noise: float = 0.003, seed: int = 0
) -> tuple[list[list[float]], list[list[float]], list[list[float]]]:
    """Seconds of the baseline, of its second process and of a stage that is `speed` times as fast."""
    draw = np.random.default_rng(seed)
    base, again, stage = np.exp(noise * draw.standard_normal((3, launches, rounds)))
    return base.tolist(), again.tolist(), (stage / speed).tolist()


def three(speed: float, **options: float) -> Times:
    base, again, stage = noisy(speed, **options)  # type: ignore[arg-type]
    return {("source", 0): base, ("source", 1): again, ("int4", 0): stage}


seconds = st.floats(1e-4, 1e2)
rounds_of_three = st.dictionaries(
    st.integers(0, 3), st.lists(st.tuples(seconds, seconds, seconds), min_size=1, max_size=6), min_size=1, max_size=4
).filter(lambda launches: sum(map(len, launches.values())) >= 2)
Rounds = dict[int, list[tuple[float, float, float]]]


def seats(launches: Rounds, order: tuple[int, int, int] = (0, 1, 2), unit: float = 1.0) -> Times:
    of = [[[unit * row[i] for row in rounds] for rounds in launches.values()] for i in order]
    return {("source", 0): of[0], ("source", 1): of[1], ("int4", 0): of[2]}


@given(rounds_of_three)
@example({0: [(1.0, 1.0, 1.0)], 1: [(1.0, 2.0, 1.0)]})
@settings(max_examples=40, deadline=None)
def test_the_interval_holds_the_ratio(launches: Rounds) -> None:
    found = ratio(seats(launches))
    assert found.low < found.ratio < found.high


@given(rounds_of_three)
@settings(max_examples=40, deadline=None)
def test_the_ratio_the_other_way_round_is_its_inverse(launches: Rounds) -> None:
    here, there = ratio(seats(launches)), ratio(seats(launches, order=(2, 1, 0)))
    assert there.ratio == pytest.approx(1 / here.ratio, rel=1e-9)


@given(rounds_of_three, st.floats(0.01, 100))
@settings(max_examples=40, deadline=None)
def test_a_clock_that_counts_in_other_units_changes_nothing(launches: Rounds, unit: float) -> None:
    here, there = ratio(seats(launches)), ratio(seats(launches, unit=unit))
    for name in ("ratio", "low", "high"):
        assert math.log(getattr(there, name)) == pytest.approx(math.log(getattr(here, name)), rel=1e-4, abs=1e-6)


@given(rounds_of_three, st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_the_order_of_rounds_and_launches_and_samples_does_not_matter(launches: Rounds, draw: random.Random) -> None:
    mixed = list(launches.values())
    draw.shuffle(mixed)
    shuffled = {i: draw.sample(rounds, len(rounds)) for i, rounds in enumerate(mixed)}
    listed = samples(seats(shuffled))
    draw.shuffle(listed)
    there = speed_figures(listed, baseline="source", parents={"source": None, "int4": "source"})
    here = figures(seats(launches))
    one, other = (f.stages["int4"][0].vs_baseline for f in (here, there))
    assert one is not None
    assert other is not None
    assert other.verdict == one.verdict
    assert (other.ratio, other.low, other.high) == pytest.approx((one.ratio, one.low, one.high), rel=1e-6)


def test_twice_the_speed_is_a_ratio_of_two() -> None:
    found = ratio({("source", 0): [[2.0, 6.0], [1.0, 4.0]], ("int4", 0): [[1.0, 3.0], [0.5, 2.0]]})
    assert found.ratio == pytest.approx(2)


def test_one_round_has_no_figures() -> None:
    assert figures({("source", 0): [[1.0]], ("int4", 0): [[1.0]]}).stages["int4"] == ()


@pytest.mark.parametrize(
    ("speed", "says"), [(1.05, "faster"), (0.95, "slower"), (1.0, "equivalent"), (1.01, "inconclusive")]
)
def test_a_verdict_is_what_the_rounds_show(speed: float, says: str) -> None:
    assert ratio(three(speed, launches=12, rounds=10)).verdict == says


def test_twice_the_speed_is_faster_even_with_one_launch_of_three_rounds() -> None:
    assert ratio(three(2.0, launches=1, rounds=3)).verdict == "faster"


def test_one_launch_never_shows_that_two_stages_are_equivalent() -> None:
    assert ratio(three(1.0, launches=1, rounds=100)).verdict == "inconclusive"


def test_tokens_per_second_count_the_whole_batch() -> None:
    decode = figures({("source", 0): [[0.5, 0.5]]}).stages["source"][0]
    assert decode.tokens_per_s.median == pytest.approx(4)
    assert decode.latency_s.median == pytest.approx(0.5)
    prefill = speed_figures(
        samples({("source", 0): [[0.5, 0.5]]}, PREFILL), baseline="source", parents={"source": None}
    ).stages["source"][0]
    assert prefill.tokens_per_s.median == pytest.approx(32)


def test_a_drift_that_all_stages_share_cancels_in_the_ratio() -> None:
    drift = np.array([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
    steady = ratio({("source", 0): [[1.0] * 3] * 2, ("source", 1): [[1.0] * 3] * 2, ("int4", 0): [[0.5] * 3] * 2})
    drifting = ratio({("source", 0): drift.tolist(), ("source", 1): drift.tolist(), ("int4", 0): (drift / 2).tolist()})
    assert drifting.verdict == "faster"
    assert (drifting.ratio, drifting.low, drifting.high) == pytest.approx((steady.ratio, steady.low, steady.high))


def test_the_two_processes_of_the_baseline_give_the_noise_floor() -> None:
    found = figures(
        {("source", 0): [[1.0, 1.0, 1.0]], ("source", 1): [[1.1, 0.9, 1.0]], ("int4", 0): [[0.9, 0.9, 0.9]]}
    )
    floor = found.noise_floor[0]
    assert floor.ratio_low < 0.95
    assert floor.ratio_high > 1.05


def test_no_claim_is_made_under_the_noise_floor() -> None:
    times = {("source", 0): [[1.0, 1.0, 1.0]], ("int4", 0): [[0.9, 0.9, 0.9]]}
    quiet = figures(times | {("source", 1): [[1.0, 1.0, 1.0]]}).stages["int4"][0].vs_baseline
    loud = figures(times | {("source", 1): [[1.5, 0.7, 1.0]]}).stages["int4"][0].vs_baseline
    assert quiet is not None
    assert loud is not None
    assert (quiet.verdict, loud.verdict) == ("faster", "inconclusive")


def test_the_ratio_to_the_parent_takes_the_parent_s_blocks() -> None:
    times = {("source", 0): [[4.0, 4.0]], ("export", 0): [[2.0, 2.0]], ("int4", 0): [[1.0, 1.0]]}
    point = figures(times, source=None, export="source", int4="export").stages["int4"][0]
    assert point.vs_baseline is not None
    assert point.vs_parent is not None
    assert (point.vs_baseline.ratio, point.vs_parent.ratio) == (pytest.approx(4), pytest.approx(2))


def test_the_baseline_is_not_compared_with_itself() -> None:
    assert figures({("source", 0): [[1.0, 1.0]]}).stages["source"][0].vs_baseline is None


def test_only_rounds_that_both_stages_have_enter_the_ratio() -> None:
    times = {("source", 0): [[1.0, 1.0, 1.0]], ("int4", 0): [[0.5, 0.5]]}
    ratio = figures(times).stages["int4"][0].vs_baseline
    assert ratio is not None
    assert ratio.ratio == pytest.approx(2)


def test_a_stage_without_samples_has_no_figures() -> None:
    assert figures({("source", 0): [[1.0, 1.0]]}).stages["int4"] == ()


def test_nothing_is_claimed_where_the_noise_is_not_known() -> None:
    found = figures({("source", 0): [[2, 2, 2], [2, 2, 2]], ("int4", 0): [[1, 1, 1], [1, 1, 1]]})
    ratio = found.stages["int4"][0].vs_baseline
    assert ratio is not None
    assert ratio.verdict == "inconclusive"
    assert ratio.rounds_to_decide is None


def test_an_undecided_ratio_says_how_many_rounds_would_decide_it() -> None:
    times = three(1.018, launches=3, rounds=4, noise=0.01)
    found = ratio(times)
    assert found.verdict == "inconclusive"
    assert found.rounds_to_decide is not None
    assert 12 < found.rounds_to_decide < 1000


def test_a_decided_ratio_names_no_rounds() -> None:
    assert ratio(three(2.0)).rounds_to_decide is None


def test_a_ratio_whose_interval_reaches_into_the_noise_says_so() -> None:
    assert ratio(three(1.0)).inside_floor
    assert not ratio(three(1.5)).inside_floor


def test_more_looks_ask_for_more_of_each_while_the_printed_interval_stays() -> None:
    times = three(1.0167, launches=5, rounds=6, noise=0.0055)
    found = [
        speed_figures(
            samples(times),
            baseline="source",
            parents={"source": None, "int4": "source"},
            plan=LookPlan.declare(looks),
            looks_taken=1,
        )
        for looks in ([30], [30, 60, 90, 120])
    ]
    one, four = (f.stages["int4"][0].vs_baseline for f in found)
    assert one is not None
    assert four is not None
    assert (one.verdict, four.verdict) == ("faster", "inconclusive")
    assert (one.low, one.high) == (four.low, four.high)


def test_more_stages_ask_for_more_of_each() -> None:
    times = three(1.0167, launches=5, rounds=6, noise=0.0055)
    crowd = {f"like{i}": "source" for i in range(12)}
    for i, name in enumerate(crowd):
        times[name, 0] = noisy(1.0, launches=5, rounds=6, noise=0.0055, seed=i + 1)[2]
    assert ratio(times).verdict == "faster"
    assert ratio(times, source=None, int4="source", **crowd).verdict == "inconclusive"


def test_the_plan_s_margin_is_that_of_the_verdicts() -> None:
    times = three(1.03, launches=12, rounds=10)
    wide = speed_figures(
        samples(times),
        baseline="source",
        parents={"source": None, "int4": "source"},
        plan=LookPlan.declare([120], margin=0.05),
    )
    verdicts = [f.stages["int4"][0].vs_baseline for f in (figures(times), wide)]
    assert [v.verdict for v in verdicts if v is not None] == ["faster", "equivalent"]


def test_a_block_far_from_its_launch_is_counted_and_stays() -> None:
    times = three(1.0)
    before = figures(times).stages["int4"][0]
    times["int4", 0][2][3] *= 3
    after = figures(times).stages["int4"][0]
    assert (before.outliers, after.outliers) == (0, 1)
    assert after.rounds == before.rounds
    assert figures(times).stages["source"][0].outliers == 0


def test_too_few_rounds_flag_nothing() -> None:
    assert figures({("source", 0): [[1.0, 1.0, 9.0]]}).stages["source"][0].outliers == 0


def test_a_look_says_what_is_decided() -> None:
    times = three(2.0, launches=3, rounds=4, noise=0.01)
    times["close", 0] = noisy(1.018, launches=3, rounds=4, noise=0.01)[2]
    plan = LookPlan.declare([12, 30])
    parents = {"source": None, "int4": "source", "close": "int4"}
    found = decide(samples(times), baseline="source", parents=parents, plan=plan, look=1)
    assert {c.stage: c.verdict for c in found.comparisons} == {"int4": "faster", "close": "inconclusive"}


def test_a_look_says_what_the_report_would_say() -> None:
    plan = LookPlan.declare([40, 80])
    for speed in (0.98, 1.0, 1.015, 1.03):
        times = three(speed)
        parents = {"source": None, "int4": "source"}
        report = speed_figures(samples(times), baseline="source", parents=parents, plan=plan, looks_taken=1)
        look = decide(samples(times), baseline="source", parents=parents, plan=plan, look=1)
        told = report.stages["int4"][0].vs_baseline
        assert told is not None
        assert look.comparisons[0].verdict == told.verdict


def test_any_two_stages_are_compared_from_their_common_rounds() -> None:
    times = three(2.0, launches=8)
    times["int8", 0] = (np.array(times["int4", 0]) * 1.25).tolist()
    found = compare_stages(samples(times), "int4", "int8", baseline="source")
    assert found[DECODE].ratio == pytest.approx(1.25)
    assert found[DECODE].verdict == "faster"
    back = compare_stages(samples(times), "int8", "int4", baseline="source")[DECODE]
    assert (back.ratio, back.verdict) == (pytest.approx(0.8), "slower")


def test_a_table_of_many_pairs_asks_for_more_of_each() -> None:
    times = three(1.017, launches=5, rounds=6, noise=0.0035)
    alone, among = (
        compare_stages(samples(times), "int4", "source", baseline="source", comparisons=n)[DECODE] for n in (1, 50)
    )
    assert (alone.verdict, among.verdict) == ("faster", "inconclusive")
    assert alone.low == among.low


def test_a_pair_without_common_rounds_is_not_compared() -> None:
    times = three(2.0)
    assert compare_stages(samples(times), "int4", "nowhere", baseline="source") == {}


def test_wildly_different_rounds_still_give_numbers() -> None:
    found = ratio({("source", 0): [[1e-4, 1e2]], ("source", 1): [[1e2, 1e-4]], ("int4", 0): [[1e2, 1e-4]]})
    assert 0 < found.low < found.ratio < found.high < math.inf
    assert found.verdict == "inconclusive"


def test_every_two_stages_are_held_against_each_other_but_the_baseline() -> None:
    times = three(2.0, launches=3, rounds=4, noise=0.01)
    times["int8", 0] = noisy(1.5, launches=3, rounds=4, noise=0.01)[2]
    times["late", 0] = noisy(1.2, launches=3, rounds=4, noise=0.01)[2]
    found = {(c.stage, c.other): c for c in contrasts(samples(times), baseline="source", points=[DECODE])}
    assert {frozenset(pair) for pair in found} == {
        frozenset(pair) for pair in (("int4", "int8"), ("int4", "late"), ("int8", "late"))
    }
    for (stage, other), contrast in found.items():
        direct = compare_stages(samples(times), stage, other, baseline="source")[DECODE]
        assert (contrast.ratio, contrast.low, contrast.high) == (direct.ratio, direct.low, direct.high)
    assert list(contrasts(samples(times), baseline="source", points=[])) == []
