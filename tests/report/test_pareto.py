"""The Pareto front: what no other stage was shown to beat, not what came out highest."""

from __future__ import annotations

from typing import Any

import pytest
from every_case import forward_report, rich_report

from pipeline.report.pareto import pareto
from pipeline.report.schema import Effect, ModelFacts, QualityFacts, Ratio, Report, Speed


def test_the_front_of_random_weights_is_one_of_agreement(report: Report) -> None:
    random = report.model_copy(update={"model": ModelFacts(source="architecture: llama", random_weights=True)})
    assert pareto(random) == ("source", "export_onnx")


def test_where_nothing_is_decoded_the_front_is_one_of_whole_passes(report: Report) -> None:
    def passing(points: tuple[Speed, ...] | None) -> tuple[Speed, ...] | None:
        """Of each stage, what was its decode, as a whole pass."""
        found = [
            p.model_copy(update={"kind": "forward", "new_tokens": None}) for p in points or () if p.kind == "decode"
        ]
        return tuple(found) or None

    stages = tuple(s.model_copy(update={"speed": passing(s.speed)}) for s in report.stages)
    assert pareto(report.model_copy(update={"stages": stages})) == pareto(report)


def test_a_broken_stage_is_never_on_the_front() -> None:
    assert pareto(rich_report()) == rich_report().pareto


def test_the_pareto_front_leaves_out_what_another_stage_beats(report: Report) -> None:
    assert pareto(report) == ("export_onnx",)


def with_decode(
    report: Report, name: str, speed: tuple[float, float], loss: tuple[float, float], effect: str = "weights"
) -> Report:
    """One stage with another speed-up and perplexity ratio, (low, high) each."""

    def changed(stage: Any) -> Any:
        if stage.name != name:
            return stage
        told = Ratio(ratio=sum(speed) / 2, low=speed[0], high=speed[1], verdict="inconclusive")
        points = tuple(p.model_copy(update={"vs_baseline": told, "vs_parent": None}) for p in stage.speed)
        paired = stage.quality.vs_baseline.model_dump()
        paired |= {"perplexity_ratio": {"ratio": sum(loss) / 2, "low": loss[0], "high": loss[1]}}
        quality = QualityFacts.model_validate({**stage.quality.model_dump(), "vs_baseline": paired})
        return stage.model_copy(update={"speed": points, "quality": quality, "effect": Effect(kind=effect)})

    return report.model_copy(update={"stages": tuple(map(changed, report.stages))})


@pytest.mark.parametrize(
    ("speed", "loss", "expected"),
    [
        ((2.6, 2.7), (0.999, 1.001), ("int4",)),  # faster, and as good
        ((2.52, 2.7), (0.999, 1.001), ("export_onnx", "int4")),  # perhaps as fast, and as good
        ((2.6, 2.7), (1.05, 1.09), ("export_onnx", "int4")),  # faster and worse
        ((2.52, 2.7), (1.05, 1.09), ("export_onnx",)),  # perhaps as fast, and worse
        ((2.52, 2.7), (0.95, 0.98), ("int4",)),  # perhaps as fast, and better
        ((2.0, 2.4), (0.999, 1.001), ("export_onnx",)),  # slower, and as good
        ((2.0, 2.4), (0.95, 0.98), ("export_onnx", "int4")),  # slower and better
    ],
)
def test_only_what_is_shown_takes_a_stage_from_the_front(
    speed: tuple[float, float], loss: tuple[float, float], expected: tuple[str, ...], report: Report
) -> None:
    found = with_decode(report, "export_onnx", (2.5, 2.56), (0.9995, 1.0005), "conversion")
    assert pareto(with_decode(found, "int4", speed, loss)) == expected


def test_what_changed_nothing_is_the_model_that_it_was_made_from(report: Report) -> None:
    found = with_decode(report, "export_onnx", (2.5, 2.56), (0.9995, 1.0005), "conversion")
    assert pareto(with_decode(found, "int4", (2.52, 2.7), (0.999, 1.001), "none")) == ("export_onnx",)
    assert pareto(forward_report()) == forward_report().pareto
