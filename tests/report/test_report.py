"""report.json is what its schema says, and the terminal shows all of it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import jsonschema
import pytest
from every_case import rich_report
from pydantic import ValidationError

from pipeline.recipe.schema import parse_gate
from pipeline.report.build import pareto
from pipeline.report.figures import megabytes
from pipeline.report.gates import METRICS, Condition, evaluate_gate
from pipeline.report.schema import (
    BreakEven,
    GateResult,
    ModelFacts,
    Report,
    Roofline,
    SlowNodes,
    Speed,
    report_json_schema,
)
from pipeline.report.terminal import render_text

GOLDEN = Path(__file__).parent / "golden.txt"


def gate(text: str, report: Report) -> GateResult:
    g = parse_gate(text)
    return evaluate_gate(Condition(g.text, g.stage, g.metric, g.selector, g.comparison, g.holds), report)


def test_a_report_fits_its_published_schema_and_is_read_back(report: Report) -> None:
    schema = report_json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(json.loads(report.to_json()), schema)
    assert Report.model_validate_json(report.to_json()) == report


def test_the_schema_refuses_what_it_does_not_know(report: Report) -> None:
    data = json.loads(report.to_json())
    data["stages"][0]["tokens_per_second"] = 3
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(data, report_json_schema())
    with pytest.raises(ValidationError):
        Report.model_validate(data)


def test_the_terminal_shows_what_it_showed_before(report: Report) -> None:
    """After a change that is meant: write render_text(report) to golden.txt, and look at the difference."""
    assert render_text(report) == GOLDEN.read_text()


def test_markup_in_a_strangers_words_is_shown_and_not_obeyed(report: Report) -> None:
    text = render_text(report)
    assert "every kind of [stage]" in text
    assert "ZeroDivisionError: [1/0]" in text


def test_a_broken_stage_shouts_however_fast_it_is(report: Report) -> None:
    rows = [line for line in render_text(report).splitlines() if line.startswith("garbage ") and "broken" in line]
    speed, quality = rows
    assert "faster, broken" in speed
    assert "not finite" in quality


def test_the_end_of_the_interval_that_is_nearest_to_failure_decides(report: Report) -> None:
    assert gate("export_onnx.decode_speedup >= 2.5", report) == GateResult(
        gate="export_onnx.decode_speedup >= 2.5", result="passed", observed=2.5
    )
    assert gate("export_onnx.decode_speedup >= 2.53", report).result == "failed"
    assert gate("export_onnx.decode_speedup <= 2.53", report).observed == 2.56


def test_all_workload_points_must_pass(report: Report) -> None:
    stages = [s for s in report.stages if s.name != "source"]
    twice = stages[0].model_copy(
        update={"speed": (*stages[0].speed, stages[0].speed[1].model_copy(update={"batch": 4}))}
    )
    both = report.model_copy(update={"stages": (twice,)})
    assert gate("export_onnx.decode_tokens_per_s{batch: 4} > 240", both).result == "passed"
    assert gate("export_onnx.decode_tokens_per_s{batch: 8} > 240", both).result == "not_evaluated"
    assert gate("export_onnx.decode_tokens_per_s > 250", both).result == "failed"


def test_a_gate_over_what_is_not_finite_fails(report: Report) -> None:
    assert gate("garbage.perplexity_ratio <= 100", report) == GateResult(
        gate="garbage.perplexity_ratio <= 100", result="failed", observed=None
    )


@pytest.mark.parametrize("metric", ["perplexity", "kl_divergence", "top1_agreement", "max_abs_logit_error"])
def test_no_quality_that_is_not_finite_passes_a_gate(metric: str, report: Report) -> None:
    assert gate(f"garbage.{metric} <= 1e9", report).result == "failed"
    assert gate(f"garbage.{metric} >= 0", report).result == "failed"


def test_a_gate_over_a_stage_that_failed_is_not_evaluated_and_says_why(report: Report) -> None:
    found = gate("bad.size_bytes < 1", report)
    assert (found.result, found.reason) == ("not_evaluated", "ZeroDivisionError: [1/0]")
    assert gate("elsewhere.size_bytes < 1", report).result == "not_evaluated"


@pytest.mark.parametrize("name", sorted(METRICS))
def test_every_metric_reads_the_measured_baseline_or_says_nothing(name: str, report: Report) -> None:
    bounds = METRICS[name].read(report.stage("source"), {}, report.stage("source"))
    assert all(math.isfinite(b.low) and b.low <= b.high for b in bounds)
    assert bounds or name in {
        "decode_speedup",
        "prefill_speedup",
        "decode_speedup_over_parent",
        "prefill_speedup_over_parent",
        "nodes",
        "weights_quantized",
        "perplexity_ratio",
        "kl_divergence",
        "top1_agreement",
        "max_abs_logit_error",
        "forward_speedup",
        "forward_speedup_over_parent",
        "forward_tokens_per_s",
        "forward_latency_s",
        "mbu",
        "mfu",
        "bytes_per_token",
        "break_even_tokens",
        "device_peak_memory_bytes",
        "casts",
        "slow_nodes",
    }


def in_full(report: Report) -> Report:
    """The report with what the newer metrics read, at `int4`: a whole pass, a roofline, an effect in full."""
    stage = report.stage("int4")
    forward = stage.speed[0].model_copy(update={"kind": "forward"})  # type: ignore[index]
    update = {
        "speed": (*(stage.speed or ()), forward),
        "roofline": Roofline(mbu=0.3, mfu=0.2, bytes_per_token=1000),
        "break_even": BreakEven(cost_s=60.0, tokens=12_400, low=11_800, high=13_100, kind="decode"),
        "device_peak_memory_bytes": 5_000,
        "effect": stage.effect.model_copy(  # type: ignore[union-attr]
            update={"casts": (4, 9), "slow_nodes": (SlowNodes(operator="MatMulNBits", count=15, reason="level 0"),)}
        ),
    }
    stages = tuple(s.model_copy(update=update) if s.name == "int4" else s for s in report.stages)
    return report.model_copy(update={"stages": stages})


@pytest.mark.parametrize(
    ("text", "observed"),
    [
        ("int4.forward_speedup >= 0.99", 0.997),
        ("int4.forward_speedup_over_parent <= 1.01", 1.006),
        ("int4.forward_tokens_per_s > 4000", 4330.0 * 0.98),
        ("int4.forward_latency_s <= 1", 1.02 / 4330.0),
        ("int4.mbu >= 0.3", 0.3),
        ("int4.mfu >= 0.2", 0.2),
        ("int4.bytes_per_token <= 1e3", 1000),
        ("int4.break_even_tokens <= 13100", 13_100),
        ("int4.device_peak_memory_bytes <= 5e3", 5_000),
        ("int4.casts <= 9", 9),
        ("int4.slow_nodes <= 15", 15),
    ],
)
def test_a_gate_reads_a_newer_figure(text: str, observed: float, report: Report) -> None:
    found = gate(text, in_full(report))
    assert (found.result, found.observed) == ("passed", pytest.approx(observed))


def test_what_is_never_earned_back_fails_every_bound(report: Report) -> None:
    """int4's decode is inconclusive: no number of tokens is known to earn its making back."""
    assert gate("int4.break_even_tokens <= 1e18", report).result == "failed"
    open_ended = BreakEven(cost_s=60.0, tokens=12_400, low=11_800, high=None, kind="decode")
    stages = tuple(s.model_copy(update={"break_even": open_ended}) for s in report.stages)
    assert gate("int4.break_even_tokens <= 1e18", report.model_copy(update={"stages": stages})).result == "failed"


def test_without_a_measurement_nothing_is_said_of_breaking_even(report: Report) -> None:
    assert gate("bad.break_even_tokens <= 1", report).result == "not_evaluated"
    assert gate("source.break_even_tokens <= 1", report).result == "not_evaluated"


@pytest.mark.parametrize(
    ("text", "observed"),
    [
        ("int4.decode_speedup_over_parent >= 0.9", 0.97),
        ("int4.size_ratio <= 1", 1.0),
        ("int4.weights_quantized == 1", 1.0),
        ("int4.nodes <= 110", 102),
        ("source.cold_load_s <= 0.5", 0.5),
        ("source.load_ratio <= 1", 1.0),
        ("source.weights_bytes <= 11e6", 11_000_000),
        ("source.peak_memory_ratio == 1", 1.0),
    ],
)
def test_a_gate_reads_its_figure(text: str, observed: float, report: Report) -> None:
    assert gate(text, report) == GateResult(gate=text, result="passed", observed=observed)


def test_a_ratio_to_a_baseline_that_was_not_measured_is_not_evaluated(report: Report) -> None:
    alone = report.model_copy(update={"stages": tuple(s for s in report.stages if s.name != "source")})
    assert gate("int4.size_ratio <= 1", alone).result == "not_evaluated"


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


@pytest.mark.parametrize(
    ("size", "words"), [(None, "–"), (0, "0.0 MB"), (11_730_000, "11.7 MB"), (13_500_000_000, "13.5 GB")]
)
def test_sizes_are_told_in_decimal_units(size: int | None, words: str) -> None:
    assert megabytes(size) == words
