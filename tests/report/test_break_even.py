"""When the time that an optimization took is earned back."""

from __future__ import annotations

import pytest

from pipeline.report.break_even import break_even, cost_of
from pipeline.report.schema import BreakEven, Effect, Report

SOURCES = {"source": (), "export_onnx": ("source",), "int4": ("export_onnx",), "both": ("int4", "export_onnx")}


def with_costs(report: Report, **costs: float | None) -> Report:
    stages = [
        s.model_copy(update={"cost": s.cost.model_copy(update={"wall_s": costs.get(s.name, s.cost.wall_s)})})
        for s in report.stages
    ]
    return report.model_copy(update={"stages": tuple(stages)})


def of(name: str, report: Report, sources: dict[str, tuple[str, ...]] = SOURCES) -> BreakEven | None:
    return break_even(report.stage(name), report, sources)


def test_a_faster_stage_earns_its_making_back(report: Report) -> None:
    """98.7 tokens/s become 2.53 times as many: a token saves 6.127 ms, and 60 s are earned after 9,793 of them."""
    found = of("export_onnx", with_costs(report, export_onnx=60.0))
    assert found is not None
    token_s = 1 / 98.7
    assert (found.cost_s, found.kind) == (60.0, "decode")
    assert found.tokens == pytest.approx(60 / (token_s * (1 - 1 / 2.53)), abs=1)
    slow, fast = 98.7 * 0.98, 98.7 * 1.02  # the ends of the baseline's own interval
    assert found.low == pytest.approx(60 * slow / (1 - 1 / 2.56), abs=1)
    assert found.high == pytest.approx(60 * fast / (1 - 1 / 2.5), abs=1)
    assert found.low < found.tokens < found.high  # type: ignore[operator]


def test_the_costs_of_the_whole_chain_count_once(report: Report) -> None:
    costs = with_costs(report, source=7.0, export_onnx=60.0, int4=3.0)
    assert cost_of("int4", costs, SOURCES) == 63.0
    twice = {**SOURCES, "garbage": ("int4", "export_onnx")}
    assert cost_of("garbage", with_costs(costs, garbage=2.0), twice) == 65.0


def test_what_the_baseline_needs_itself_is_no_cost(report: Report) -> None:
    exported = with_costs(report, source=7.0, export_onnx=60.0, int4=3.0).model_copy(update={"baseline": "export_onnx"})
    assert cost_of("int4", exported, SOURCES) == 3.0


@pytest.mark.parametrize("name", ["source", "int4", "same", "bad"])
def test_what_is_not_faster_or_was_not_measured_earns_nothing(name: str, report: Report) -> None:
    assert of(name, report) is None


def changed(report: Report, name: str, **more: object) -> Report:
    stages = [s.model_copy(update=more) if s.name == name else s for s in report.stages]
    return report.model_copy(update={"stages": tuple(stages)})


def test_what_changed_nothing_and_was_timed_faster_earns_nothing(report: Report) -> None:
    costs = with_costs(report, export_onnx=60.0)
    assert of("export_onnx", costs) is not None
    assert of("export_onnx", changed(costs, "export_onnx", effect=Effect(kind="none", nodes=(132, 132)))) is None


def test_garbage_earns_nothing_however_fast_it_is(report: Report) -> None:
    costs = with_costs(report, export_onnx=60.0, garbage=3.0)
    sources = {**SOURCES, "garbage": ("export_onnx",)}
    assert of("garbage", costs, sources) is None
    assert of("garbage", changed(costs, "garbage", quality=None), sources) is not None


def test_a_cost_that_nobody_recorded_is_not_guessed(report: Report) -> None:
    assert of("export_onnx", with_costs(report, export_onnx=None)) is None


def test_whole_passes_count_where_nothing_is_decoded(report: Report) -> None:
    stages = []
    for stage in report.stages:
        points = [p.model_copy(update={"kind": "forward", "new_tokens": None}) for p in stage.speed or ()][1:]
        stages.append(stage.model_copy(update={"speed": tuple(points) or None}))
    found = of("export_onnx", report.model_copy(update={"stages": tuple(stages)}))
    assert found is not None
    assert found.kind == "forward"
