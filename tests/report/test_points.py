"""Workload points are told apart by all that makes them different."""

from __future__ import annotations

from every_case import forward_report, rich_report

from pipeline.report.points import apart, first_points, is_faster, point_in_words, points_of, speed_at, timed_at
from pipeline.report.schema import Contrast, Report

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


def test_of_two_stages_their_own_ratio_decides_and_else_what_their_other_ratios_show(report: Report) -> None:
    source, export, int4 = (report.stage(name) for name in ("source", "export_onnx", "int4"))
    assert export.speed is not None
    decode = next(p for p in export.speed if p.kind == "decode")
    assert is_faster(export, int4, decode, report)  # 2.50-2.56 and 0.97-1.08 times the baseline
    assert not is_faster(int4, export, decode, report)
    assert is_faster(export, source, decode, report)
    assert not is_faster(source, export, decode, report)
    where = {"kind": "decode", "batch": 1, "prompt": 128, "new_tokens": decode.new_tokens}
    for low, high, faster in ((1.1, 1.3, True), (0.9, 1.2, False), (0.7, 0.9, False)):
        contrast = Contrast(stage="int4", other="export_onnx", ratio=(low + high) / 2, low=low, high=high, **where)
        found = report.model_copy(update={"contrasts": (contrast,)})
        assert is_faster(int4, export, decode, found) == faster
        assert is_faster(export, int4, decode, found) == (high < 1)
