"""report.json is what its schema says, and the terminal shows all of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from pydantic import ValidationError

from pipeline.recipe.schema import parse_gate
from pipeline.report.figures import megabytes
from pipeline.report.gates import METRICS, Condition, evaluate_gate
from pipeline.report.schema import (
    BreakEven,
    Effect,
    GateResult,
    NoiseFloor,
    Ratio,
    Report,
    Roofline,
    Schedule,
    SlowNodes,
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
    bounds = METRICS[name].read(report.stage("source"), {}, report)
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
    floor = NoiseFloor(kind="forward", batch=1, prompt=128, ratio_low=0.996, ratio_high=1.004)
    return report.model_copy(update={"stages": stages, "noise_floor": (*report.noise_floor, floor)})


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


def timed(
    report: Report,
    low: float,
    high: float,
    verdict: str,
    *,
    floor: tuple[float, float] | None = (0.98, 1.02),
    fits: bool = True,
    over_parent: tuple[float, float, str] | None = None,
    **more: Any,
) -> Report:
    """The report with one decode speed at `int4`, and the noise floor of decode."""
    stage = report.stage("int4")

    def ratio(low: float, high: float, verdict: str) -> Ratio:
        return Ratio.model_validate({"ratio": (low * high) ** 0.5, "low": low, "high": high, "verdict": verdict})

    changes = {"vs_baseline": ratio(low, high, verdict), "vs_parent": ratio(*over_parent) if over_parent else None}
    point = stage.speed[1].model_copy(update=changes)  # type: ignore[index]
    stages = [s.model_copy(update={"speed": (point,), **more}) if s is stage else s for s in report.stages]
    floors = [NoiseFloor(kind="decode", batch=1, prompt=128, ratio_low=floor[0], ratio_high=floor[1])] if floor else []
    schedule = Schedule(
        budget_s=60, margin=0.01, looks=(12,), looks_taken=1, rounds=12, launches=3, ended="looks", fits=fits
    )
    return report.model_copy(update={"stages": tuple(stages), "noise_floor": tuple(floors), "schedule": schedule})


@pytest.mark.parametrize(
    ("text", "interval", "verdict", "result"),
    [
        ("int4.decode_speedup >= 1.05", (1.06, 1.09), "faster", "passed"),
        ("int4.decode_speedup >= 1.05", (1.06, 1.09), "inconclusive", "failed"),  # the report claims nothing
        ("int4.decode_speedup > 1", (1.001, 1.09), "inconclusive", "failed"),
        ("int4.decode_speedup >= 1", (1.001, 1.09), "inconclusive", "failed"),  # inside the floor of 2 %
        ("int4.decode_speedup >= 1", (1.021, 1.09), "inconclusive", "passed"),
        ("int4.decode_speedup >= 0.99", (0.995, 1.005), "inconclusive", "failed"),  # nearer to 1 than the floor
        ("int4.decode_speedup >= 0.95", (0.96, 1.005), "inconclusive", "passed"),  # not slower: the floor is smaller
        ("int4.decode_speedup >= 0.95", (0.94, 1.005), "inconclusive", "failed"),
        ("int4.decode_speedup <= 0.9", (0.8, 0.85), "slower", "passed"),
        ("int4.decode_speedup <= 0.9", (0.8, 0.85), "inconclusive", "failed"),
        ("int4.decode_speedup <= 1.01", (0.995, 1.005), "equivalent", "failed"),
        ("int4.decode_speedup <= 1.05", (0.995, 1.04), "inconclusive", "passed"),
    ],
)
def test_a_gate_on_a_speed_up_passes_on_nothing_that_the_report_does_not_claim(
    text: str, interval: tuple[float, float], verdict: str, result: str, report: Report
) -> None:
    found = gate(text, timed(report, *interval, verdict))
    assert found.result == result
    assert found.observed == interval[0 if ">" in text else 1]


def test_a_gate_that_the_noise_keeps_from_passing_says_so(report: Report) -> None:
    found = gate("int4.decode_speedup >= 1.05", timed(report, 1.06, 1.4, "inconclusive", floor=(0.6, 1.5)))
    assert found.reason == "inconclusive: inside the noise floor of 66.7 %"
    assert "2.0 %" in str(gate("int4.decode_speedup >= 0.99", timed(report, 0.995, 1.0, "equivalent")).reason)
    wild = timed(report, 0.96, 1.0, "inconclusive", floor=(1e-7, 1e7))
    assert gate("int4.decode_speedup >= 0.95", wild).reason == (
        "nearer to 1 than a noise floor that is beyond all use: not shown"
    )


@pytest.mark.parametrize(("more", "told"), [({"fits": False}, "budget"), ({"floor": None}, "noise floor is not known")])
def test_without_evidence_a_gate_on_a_speed_up_is_not_evaluated(
    more: dict[str, Any], told: str, report: Report
) -> None:
    found = gate("int4.decode_speedup >= 1.05", timed(report, 1.06, 1.09, "faster", **more))
    assert found.result == "not_evaluated"
    assert told in str(found.reason)


NONE = {"effect": Effect(kind="none", nodes=(102, 102))}


def test_what_changed_nothing_passes_no_gate_that_its_parent_would_not_pass(report: Report) -> None:
    """export_onnx decodes 2.5 to 2.56 times as fast as the baseline; int4 is made from it."""
    found = timed(report, 2.9, 3.0, "faster", over_parent=(1.15, 1.2, "faster"), **NONE)
    assert gate("int4.decode_speedup >= 2.45", found).result == "passed"
    assert gate("int4.decode_speedup_over_parent >= 0.95", found).result == "passed"
    for text in ("int4.decode_speedup >= 2.7", "int4.decode_speedup_over_parent >= 1.1"):
        told = gate(text, found)
        assert told.result == "failed"
        assert told.reason == "it changed nothing, so that it is as fast as export_onnx: the difference is noise"
    changed = timed(report, 2.9, 3.0, "faster", over_parent=(1.15, 1.2, "faster"))
    assert gate("int4.decode_speedup >= 2.7", changed).result == "passed"


@pytest.mark.parametrize(
    "text",
    ["decode_speedup >= 0.1", "decode_tokens_per_s > 1", "decode_latency_s < 9", "mbu >= 0", "break_even_tokens < 1e9"],
)
def test_a_stage_that_failed_while_it_was_measured_passes_no_gate_on_its_speed(text: str, report: Report) -> None:
    more = {
        "roofline": Roofline(mbu=0.3),
        "break_even": BreakEven(cost_s=1.0, tokens=9, low=8, high=10, kind="decode"),
    }
    whole = timed(report, 1.06, 1.09, "faster", **more)
    assert gate(f"int4.{text}", whole).result == "passed"
    late = timed(report, 1.06, 1.09, "faster", status="unmeasured", reason="its process died in round 9", **more)
    assert gate(f"int4.{text}", late) == GateResult(
        gate=f"int4.{text}", result="not_evaluated", reason="its process died in round 9"
    )
    assert gate("int4.size_bytes > 1", late).result == "passed"


def test_what_nothing_explains_and_what_is_broken_is_never_earned_back(report: Report) -> None:
    changed = timed(report, 1.06, 1.09, "faster", over_parent=(1.06, 1.09, "faster"))
    assert gate("int4.break_even_tokens <= 1e18", changed).result == "not_evaluated"  # its cost is not known
    idle = timed(report, 1.06, 1.09, "faster", over_parent=(1.06, 1.09, "faster"), **NONE)
    assert gate("int4.break_even_tokens <= 1e18", idle).result == "failed"
    assert gate("garbage.break_even_tokens <= 1e18", report).result == "failed"


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
        ("int4.decode_speedup_over_parent >= 0.3", 0.38),
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


@pytest.mark.parametrize(
    ("size", "words"), [(None, "–"), (0, "0.0 MB"), (11_730_000, "11.7 MB"), (13_500_000_000, "13.5 GB")]
)
def test_sizes_are_told_in_decimal_units(size: int | None, words: str) -> None:
    assert megabytes(size) == words
