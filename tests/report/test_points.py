"""Workload points are told apart by all that makes them different."""

from __future__ import annotations

from every_case import forward_report, rich_report

from pipeline.report.points import apart, first_points, point_in_words, points_of, speed_at, timed_at

RICH = rich_report()


def test_points_that_differ_in_new_tokens_alone_are_two() -> None:
    keys = [p.point for p in points_of(RICH)]
    assert len(keys) == len(set(keys)) == 5
    assert keys[:2] == [("decode", 1, 128, 64), ("decode", 1, 128, 256)]


def test_decode_is_told_before_prefill_and_shorter_before_longer() -> None:
    assert [(p.kind, p.prompt) for p in points_of(RICH)] == [
        ("decode", 128),
        ("decode", 128),
        ("decode", 512),
        ("prefill", 128),
        ("prefill", 512),
    ]


def test_each_kind_is_represented_by_the_point_that_the_recipe_names_first() -> None:
    assert [p.point for p in first_points(RICH)] == [("decode", 1, 128, 64), ("prefill", 1, 128, None)]
    assert [p.point for p in first_points(forward_report())] == [("forward", 2, 1024, None)]


def test_a_stage_is_read_at_the_very_point_that_is_meant() -> None:
    long = next(p for p in points_of(RICH) if p.new_tokens == 256)
    own = speed_at(RICH.stage("int4"), long)
    assert own is not None
    assert own.tokens_per_s.median == 511.0
    assert speed_at(RICH.stage("bad"), long) is None
    assert "bad" not in [s.name for s, _ in timed_at(RICH, long)]


def test_a_point_is_told_by_what_makes_it_different() -> None:
    assert [apart(p, RICH) for p in points_of(RICH)][1:4] == [
        "batch 1, prompt 128, new tokens 256",
        "batch 4, prompt 512, new tokens 64",
        "batch 1, prompt 128",
    ]
    assert apart(points_of(forward_report())[0], forward_report()) == ""


def test_the_work_is_said_in_words() -> None:
    assert point_in_words(points_of(forward_report())[0]) == "forward pass of 1024 tokens, batch 2"
