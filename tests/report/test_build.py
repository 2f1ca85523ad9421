"""What a run found out, put together: rooflines, what makes the host's figures doubtful, and what is remembered."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from pipeline import evaluate
from pipeline.evaluate import Measured
from pipeline.hardware.probe import Figure, ProbeResult
from pipeline.measure.samples import Sample, SpeedMeasurement
from pipeline.measure.work_counts import Work
from pipeline.measure.workload import Point
from pipeline.recipe import load_recipe
from pipeline.report.build import _notes_on_the_host, _timings
from pipeline.report.schema import Report, Roofline
from pipeline.run import run
from pipeline.store import Store

PROBED = ProbeResult(
    measured_at=datetime(2026, 1, 1, tzinfo=UTC),
    host={},
    threads=2,
    torch="2.13.0",
    load_average_1m=0.1,
    bandwidth_gb_per_s=Figure.best_of([30.0]),
    buffer_bytes=1,
    gemm_gflops={},
    gemm_kernels={},
)


def measured(*bandwidth: float) -> Measured:
    speed = SpeedMeasurement(baseline="source", seed=0)
    return Measured(text_digest="", speed=speed, bandwidth=tuple(Figure.best_of([b]) for b in bandwidth))


def test_a_bandwidth_that_moved_is_told_with_both_figures() -> None:
    assert _notes_on_the_host(PROBED, measured(40.0, 47.9)) == ()
    (note,) = _notes_on_the_host(PROBED, measured(82.0, 45.0))
    assert "at 82 GB/s before the speed measurement and at 45 GB/s after it" in note
    assert _notes_on_the_host(PROBED, measured()) == ()


def test_ceilings_that_were_measured_beside_other_work_are_told() -> None:
    busy = PROBED.model_copy(update={"load_average_1m": 1.7})
    (note,) = _notes_on_the_host(busy, measured(40.0, 40.0))
    assert "beside other work (load 1.7)" in note
    assert _notes_on_the_host(busy, Measured(text_digest="")) == ()
    assert _notes_on_the_host(busy, measured(), "cuda") == ()


def test_a_timing_has_the_median_of_the_report_and_the_fastest_block(report: Report) -> None:
    point = Point(kind="decode", batch=1, prompt=128, new_tokens=64)
    other = Point(kind="decode", batch=4, prompt=128, new_tokens=64)
    stage = report.stage("int4")
    blocks = [
        Sample(stage=name, launch=0, round=i, order=0, point=point, seconds=seconds, started_s=0)
        for i, (name, seconds) in enumerate([("int4", (0.03, 0.05)), ("int4", (0.02, 0.03)), ("source", (0.001,))])
    ]
    work = dict.fromkeys((point, other), Work(tokens=1, weights_bytes=1, flops={}, launches=1))
    speed = SpeedMeasurement(baseline="source", seed=0, samples=tuple(blocks))
    found, unmeasured = _timings(work, stage, speed)
    assert found.seconds == pytest.approx(1 / 101.0)
    assert found.best_s == 0.025
    assert (unmeasured.seconds, unmeasured.best_s) == (None, None)


@pytest.mark.slow
@pytest.mark.usefixtures("plugins", "measured_briefly")
def test_a_run_has_rooflines_and_the_next_one_remembers_their_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, probed_store: Callable[[Path], Store]
) -> None:
    sets = ["passes=[{pass: mark}]", "export=null", "gates=[]", "hardware=local"]
    sets += ["evaluate.budget_s=1", "evaluate.quality.tokens=600", "evaluate.quality.window=64"]
    sets += ["evaluate.quality.stride=32", "evaluate.workload.prompt_lengths=[8]", "evaluate.workload.new_tokens=4"]
    store = probed_store(tmp_path / "store")
    first = run(load_recipe("llama2-cpu", sets), store=store, runs=tmp_path / "runs").report
    found = first.stage("mark").roofline
    assert found is not None
    assert found.bandwidth_gb_per_s is not None
    decode = next(p for p in first.stage("mark").speed or () if p.kind == "decode")
    assert found.bytes_per_token is not None
    expected = found.bytes_per_token * decode.tokens_per_s.median / found.bandwidth_gb_per_s / 1e9
    assert found.mbu == pytest.approx(expected)
    assert found.mfu is not None
    around = first.host["bandwidth_gb_per_s"]
    assert found.bandwidth_gb_per_s == max(first.host["probe"]["bandwidth_gb_per_s"]["value"], *_values(around))
    assert found.target is not None  # `local` is this host, as measured
    assert found.target.decode_tokens_per_s_limit == pytest.approx(decode.tokens_per_s.median / found.mbu)

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("counted again")

    monkeypatch.setattr(evaluate, "count_work", fail)
    again = run(load_recipe("llama2-cpu", sets), store=store, runs=tmp_path / "runs", measure=False).report
    remembered = again.stage("mark").roofline
    assert remembered == Roofline(
        **found.model_dump(include={"bytes_per_token", "flops_per_token", "prefill_flops_per_token", "compute_dtype"}),
        bandwidth_gb_per_s=first.host["probe"]["bandwidth_gb_per_s"]["value"],
        gflops=found.gflops,
        target=remembered.target if remembered else None,
    )


def _values(around: dict[str, dict[str, float]]) -> list[float]:
    return [around["before"]["value"], around["after"]["value"]]
