"""A verdict says what it is worth."""

from __future__ import annotations

import pytest
from every_case import forward_report, rich_report

from pipeline.report.points import points_of, speed_at
from pipeline.report.schema import Ratio, Schedule, Speed
from pipeline.report.verdicts import (
    counts_in_words,
    is_contradicted,
    margin_of,
    noise_floor,
    outliers_in_words,
    schedule_in_words,
    undecided_in_words,
    why_undecided,
)


def ratio(low: float, high: float, **more: object) -> Ratio:
    return Ratio.model_validate(
        {"ratio": (low + high) / 2, "low": low, "high": high, "verdict": "inconclusive", **more}
    )


@pytest.mark.parametrize(
    ("found", "floor", "expected"),
    [
        (ratio(0.99, 1.01), 0.016, "inside the noise floor of 1.6 %"),
        (ratio(1.013, 1.03, inside_floor=True), 0.016, "reaches into the noise floor of 1.6 %"),
        (ratio(1e-6, 1e6), 1e7, "inside a noise floor that is beyond all use"),
        (ratio(1.21, 1.59), 0.46, "reaches into the noise floor of 46.0 %"),
        (ratio(0.8, 1.59), 0.016, "reaches into the noise floor of 1.6 %"),
        (ratio(1.005, 1.03, inside_floor=True), 0.006, ""),  # it is the margin that it reaches into
        (ratio(1.005, 1.03), 0.004, ""),
        (ratio(1.02, 1.03), 0.016, "shown by its own interval, and not for all comparisons at once"),
        (ratio(1.005, 1.03, rounds_to_decide=190), 0.004, "about 190 rounds may decide"),
        (
            ratio(1.02, 1.03, rounds_to_decide=4100),
            None,
            "the noise floor is not known, over 1,000 rounds may decide",
        ),
        (ratio(0.99, 1.01, verdict="equivalent"), 0.016, ""),
        (ratio(2.0, 3.0, verdict="faster", inside_floor=True), 0.016, ""),
    ],
)
def test_an_undecided_ratio_says_why(found: Ratio, floor: float | None, expected: str) -> None:
    report = forward_report()
    floors = tuple(
        f.model_copy(update={"ratio_low": 1.0, "ratio_high": 1 + floor})
        for f in report.noise_floor
        if floor is not None
    )
    report = report.model_copy(update={"noise_floor": floors})
    assert why_undecided(found, points_of(report)[0], report) == expected


@pytest.mark.parametrize(
    ("looks", "taken", "ended", "expected"),
    [
        (
            (12, 30, 80, 200),
            2,
            "decided",
            "30 rounds in 6 launches; looked after 12 and 30 of 12, 30, 80, 200 rounds; ended because all was decided",
        ),
        (
            (12, 30),
            2,
            "looks",
            "30 rounds in 6 launches; looked after 12 and 30 rounds, as planned; ended with the last look",
        ),
        (
            (100,),
            0,
            "budget",
            "30 rounds in 6 launches; never looked whether all is decided (planned: after 100 rounds); "
            "ended because the budget of 60 s was used up",
        ),
    ],
)
def test_the_schedule_is_told_in_a_line(looks: tuple[int, ...], taken: int, ended: str, expected: str) -> None:
    schedule = Schedule.model_validate(
        {"budget_s": 60.0, "margin": 0.01, "looks": looks, "looks_taken": taken, "rounds": 30, "launches": 6}
        | {"ended": ended}
    )
    assert schedule_in_words(schedule) == expected


def test_one_round_is_not_many() -> None:
    point = points_of(rich_report())[0].model_copy(update={"rounds": 1, "launches": 1})
    assert counts_in_words([point]) == "1 round in 1 launch"


def test_outliers_are_told_and_none_is_not() -> None:
    point = points_of(forward_report())[0]
    assert outliers_in_words(point) == "3 of 100 blocks far off"
    assert outliers_in_words(point.model_copy(update={"outliers": 0})) == ""


def test_what_changed_nothing_and_is_faster_than_its_parent_is_a_contradiction_there_alone() -> None:
    report = rich_report()
    cleanup = report.stage("cleanup")
    found = {p.point: is_contradicted(cleanup, p, report) for p in cleanup.speed or ()}
    assert [key for key, contradicted in found.items() if contradicted] == [("decode", 1, 128, 256)]
    assert not any(is_contradicted(report.stage("int4"), p, report) for p in report.stage("int4").speed or ())


def test_the_floor_and_the_margin_are_the_reports_own() -> None:
    report = rich_report()
    long = next(p for p in points_of(report) if p.new_tokens == 256)
    own = speed_at(report.stage("source"), long)
    assert own is not None
    assert noise_floor(own, report) == pytest.approx(1 / 0.985 - 1)
    assert margin_of(report) == 0.01
    assert report.schedule is not None
    wider = report.model_copy(update={"schedule": report.schedule.model_copy(update={"margin": 0.03})})
    assert margin_of(wider) == 0.03


def test_what_keeps_stages_from_a_verdict_is_told_once_for_all_of_them() -> None:
    report = forward_report()
    report = report.model_copy(
        update={"noise_floor": tuple(f.model_copy(update={"ratio_high": 1.016}) for f in report.noise_floor)}
    )
    point = points_of(report)[0]

    def timed(name: str, found: Ratio | None) -> tuple[str, Speed]:
        return name, point.model_copy(update={"vs_baseline": found})

    undecided = [
        timed("source", None),
        timed("fast", ratio(2.0, 3.0, verdict="faster")),
        timed("near", ratio(0.99, 1.05, rounds_to_decide=25)),
        timed("nearer", ratio(0.98, 1.04, rounds_to_decide=4100)),
        timed("within", ratio(0.999, 1.01)),
        timed("beyond", ratio(1.02, 1.03)),
    ]
    assert undecided_in_words(undecided, report) == [
        "inconclusive, reaches into the noise floor of 1.6 %: near (about 25 rounds may decide), nearer (over 1,000)",
        "inconclusive, inside the noise floor of 1.6 %: within",
        "inconclusive, shown by its own interval, and not for all comparisons at once: beyond",
    ]
    assert undecided_in_words(undecided[:2], report) == []
