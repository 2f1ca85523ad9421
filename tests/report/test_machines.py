"""Which device a report says that its figures are of."""

from __future__ import annotations

from pipeline.report.html import cost_rows
from pipeline.report.machines import measured_on, measured_to_run
from pipeline.report.markdown import render_markdown
from pipeline.report.schema import PredictedMemory, Report
from pipeline.report.terminal import render_text

GPUS = [{"name": "NVIDIA H200", "memory_bytes": 150_754_820_096, "driver": "580.1"}]


def on_a_gpu(report: Report) -> Report:
    """The report as if its models had run on the host's first GPU."""
    hardware = {**report.hardware, "name": "h200", "device": "cuda"}
    return report.model_copy(update={"hardware": hardware, "host": {**report.host, "gpus": GPUS}})


def test_models_that_ran_on_a_gpu_were_measured_on_it(report: Report) -> None:
    processor = str(report.host["cpu_model"])
    there = on_a_gpu(report)
    assert measured_on(there) == f"NVIDIA H200 beside {processor}"
    assert f"measured on NVIDIA H200 beside {processor}" in render_text(there, width=200)
    assert f"Measured on NVIDIA H200 beside {processor}" in render_markdown(there)


def test_a_gpu_that_nothing_ran_on_is_not_what_was_measured_on(report: Report) -> None:
    idle = report.model_copy(update={"host": {**report.host, "gpus": GPUS}})
    assert measured_on(idle) == report.host["cpu_model"]


def test_an_estimate_for_a_gpu_is_shown_beside_the_gpus_memory(report: Report) -> None:
    predicted = PredictedMemory(inference_bytes=9_000, weights_bytes=1, mapped_bytes=0)
    update = {"device_peak_memory_bytes": 7_000, "inference_peak_memory_bytes": 3_000, "predicted_memory": predicted}
    stage = report.stage("source").model_copy(update=update)
    report = report.model_copy(update={"stages": (stage,)})
    there = on_a_gpu(report)
    assert (measured_to_run(stage, report), measured_to_run(stage, there)) == (3_000, 7_000)
    (row,) = cost_rows(there)
    assert row.running == (round(100 * 7 / 9, 2), 100.0)
