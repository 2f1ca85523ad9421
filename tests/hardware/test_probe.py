"""The probe: run once, kept, and honest about spread. Clocks and measurements are passed in."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import HostError
from pipeline.hardware import Host
from pipeline.hardware import probe as probe_module
from pipeline.hardware.probe import (
    Figure,
    ProbeResult,
    ReadBandwidth,
    cached_probe,
    measure_in_worker,
    probe,
    quick_bandwidth,
    repeat,
)

MIB, GIB = 1024**2, 1024**3


def a_host(**changes: Any) -> Host:
    values: dict[str, Any] = {
        "cpu_model": "Imaginary CPU",
        "physical_cores": 2,
        "logical_cores": 4,
        "memory_bytes": 8 * GIB,
        "available_memory_bytes": 4 * GIB,
        "os": "Linux",
        "architecture": "x86_64",
        "python": "3.11.7",
        "kernel": "6.1",
    }
    return Host(**{**values, **changes})


def a_result(**changes: Any) -> ProbeResult:
    values: dict[str, Any] = {
        "measured_at": datetime(2026, 2, 3, 4, 5, tzinfo=UTC),
        "host": {},
        "threads": 2,
        "torch": "2.13.0",
        "load_average_1m": 0.0,
        "bandwidth_gb_per_s": Figure.best_of([40.0, 44.0]),
        "buffer_bytes": 256 * MIB,
        "gemm_gflops": {"float32": Figure.best_of([90.0, 100.0]), "float16": None},
        "gemm_kernels": {"float32": "torch.mm, 1024 x 1024"},
    }
    return ProbeResult(**{**values, **changes})


class Measurement:
    """Stands for the measurement: counts how often it is asked for and gives another figure each time."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> ProbeResult:
        self.times += 1
        return a_result(bandwidth_gb_per_s=Figure.best_of([float(self.times)]))


class Ticks:
    """A clock that goes on by one step each time it is read."""

    def __init__(self, step_s: float) -> None:
        self.step_s, self.now = step_s, 0.0

    def __call__(self) -> float:
        self.now += self.step_s
        return self.now


# --- figures


def test_a_figure_is_the_best_of_its_repetitions_and_shows_their_spread() -> None:
    figure = Figure.best_of([3.0, 9.0, 4.0, 5.0])
    assert (figure.value, figure.statistic) == (9.0, "best")
    assert (figure.low, figure.median, figure.high, figure.repetitions) == (3.0, 4.5, 9.0, 4)


def test_a_figure_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no repetition"):
        Figure.best_of([])


@pytest.mark.parametrize(("load", "busy"), [(None, False), (0.0, False), (0.49, False), (0.5, True), (3.0, True)])
def test_a_result_knows_whether_the_host_was_busy(load: float | None, busy: bool) -> None:
    assert a_result(load_average_1m=load).was_busy is busy


# --- run once and keep


def test_a_host_is_measured_once(tmp_path: Path) -> None:
    measurement = Measurement()
    first = probe(a_host(), tmp_path, measure=measurement)
    second = probe(a_host(), tmp_path, measure=measurement)
    assert measurement.times == 1
    assert second == first


def test_each_number_of_threads_has_a_result_of_its_own(tmp_path: Path) -> None:
    measurement = Measurement()
    both, one = (probe(a_host(), tmp_path, threads=threads, measure=measurement) for threads in (2, 1))
    assert measurement.times == 2
    assert both != one
    assert cached_probe(a_host(), tmp_path, threads=1) == one
    assert cached_probe(a_host(), tmp_path) == both  # as many as the host has cores
    assert cached_probe(a_host(), tmp_path, threads=3) is None


def test_again_measures_anew_and_keeps_the_new_result(tmp_path: Path) -> None:
    measurement = Measurement()
    probe(a_host(), tmp_path, measure=measurement)
    probe(a_host(), tmp_path, again=True, measure=measurement)
    kept = cached_probe(a_host(), tmp_path)
    assert kept is not None
    assert kept.bandwidth_gb_per_s.value == 2.0


def test_nothing_is_kept_before_the_first_measurement(tmp_path: Path) -> None:
    assert cached_probe(a_host(), tmp_path / "absent") is None


def test_another_cpu_is_another_result(tmp_path: Path) -> None:
    measurement = Measurement()
    probe(a_host(), tmp_path, measure=measurement)
    other = a_host(cpu_model="Another CPU")
    assert cached_probe(other, tmp_path) is None
    probe(other, tmp_path, measure=measurement)
    assert measurement.times == 2
    assert cached_probe(a_host(), tmp_path) is not None


def test_a_result_stands_though_memory_and_load_have_changed(tmp_path: Path) -> None:
    probe(a_host(), tmp_path, measure=Measurement())
    assert cached_probe(a_host(available_memory_bytes=GIB, load_average=(5.0, 5.0, 5.0)), tmp_path) is not None


@pytest.mark.parametrize("text", ["", "{", '{"schema_version": 1}', "[]"])
def test_a_damaged_result_is_measured_again(tmp_path: Path, text: str) -> None:
    measurement = Measurement()
    probe(a_host(), tmp_path, measure=measurement)
    (path,) = tmp_path.iterdir()
    path.write_text(text, encoding="utf-8")
    assert cached_probe(a_host(), tmp_path) is None
    probe(a_host(), tmp_path, measure=measurement)
    assert measurement.times == 2


def test_a_result_of_another_schema_is_not_used(tmp_path: Path) -> None:
    probe(a_host(), tmp_path, measure=Measurement())
    (path,) = tmp_path.iterdir()
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": 2}), encoding="utf-8")
    assert cached_probe(a_host(), tmp_path) is None


def test_a_result_that_was_copied_from_another_host_is_not_used(tmp_path: Path) -> None:
    probe(a_host(), tmp_path, measure=Measurement())
    (path,) = tmp_path.iterdir()
    foreign = {**json.loads(path.read_text()), "host": a_host(cpu_model="Another CPU").facets()}
    path.write_text(json.dumps(foreign), encoding="utf-8")
    assert cached_probe(a_host(), tmp_path) is None


def test_nothing_but_the_result_is_left_in_the_folder(tmp_path: Path) -> None:
    probe(a_host(), tmp_path / "deep" / "folder", measure=Measurement())
    (path,) = (tmp_path / "deep" / "folder").iterdir()
    assert path.suffix == ".json"
    assert json.loads(path.read_text())["host"] == a_host().facets()


def test_a_write_that_fails_leaves_the_result_before_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measurement = Measurement()
    probe(a_host(), tmp_path, measure=measurement)

    def full_disk(_: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        probe(a_host(), tmp_path, again=True, measure=measurement)
    kept = cached_probe(a_host(), tmp_path)
    assert kept is not None
    assert kept.bandwidth_gb_per_s.value == 1.0
    assert len(list(tmp_path.iterdir())) == 1


# --- repetition and bandwidth


def test_an_operation_is_repeated_until_its_time_is_over() -> None:
    durations = repeat(lambda: None, seconds=10.0, clock=Ticks(1.0))
    assert durations == [1.0] * 10


def test_a_slow_operation_is_repeated_three_times_all_the_same() -> None:
    assert repeat(lambda: None, seconds=10.0, clock=Ticks(100.0)) == [100.0] * 3


def test_durations_include_the_time_of_the_operation() -> None:
    clock = Ticks(1.0)
    steps: Iterator[float] = iter([5.0, 7.0, 9.0])

    def work() -> None:
        clock.now += next(steps)

    assert repeat(work, seconds=0, clock=clock) == [6.0, 8.0, 10.0]


def test_bandwidth_is_bytes_read_over_time() -> None:
    with ReadBandwidth(threads=2, buffer_bytes=MIB) as bandwidth:
        assert bandwidth.buffer_bytes == MIB
        # The clock says that every repetition took a second, longer than one sweep is meant to take: one sweep each.
        assert bandwidth.measure(seconds=3.0, clock=Ticks(1.0)) == [MIB / 1e9] * 3


def test_a_fast_read_is_swept_several_times_in_one_repetition() -> None:
    with ReadBandwidth(threads=1, buffer_bytes=MIB) as bandwidth:
        # One sweep takes 5 ms by this clock, so five make up the 25 ms of one repetition.
        rates = bandwidth.measure(seconds=0.1, clock=Ticks(0.005))
    assert rates == pytest.approx([5 * MIB / 0.005 / 1e9] * len(rates))


def test_the_buffer_is_written_so_that_it_takes_memory_of_its_own() -> None:
    with ReadBandwidth(threads=2, buffer_bytes=MIB) as bandwidth:
        assert all((part == 1).all() for part in bandwidth._parts)


def test_bandwidth_can_be_measured_more_than_once_on_one_buffer() -> None:
    with ReadBandwidth(threads=1, buffer_bytes=MIB) as bandwidth:
        first = bandwidth.measure(seconds=0, clock=Ticks(1.0))
        assert bandwidth.measure(seconds=0, clock=Ticks(1.0)) == first


def test_quick_bandwidth_needs_no_torch_and_gives_a_positive_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    figure = quick_bandwidth(0.01, host=a_host(available_memory_bytes=64 * MIB))
    assert figure.value > 0
    assert figure.repetitions >= 3


@pytest.mark.parametrize(
    ("l3_bytes", "available_bytes", "expected"),
    [
        (None, 64 * GIB, 256 * MIB),
        (32 * MIB, 64 * GIB, 256 * MIB),
        (256 * MIB, 64 * GIB, 1024 * MIB),
        (256 * MIB, 2 * GIB, 512 * MIB),
        (None, 0, 8 * MIB),
    ],
)
def test_the_buffer_is_well_beyond_the_cache_and_within_the_memory(
    l3_bytes: int | None, available_bytes: int, expected: int
) -> None:
    host = a_host(l3_cache_bytes=l3_bytes, available_memory_bytes=available_bytes)
    assert probe_module._buffer_bytes(host) == expected


# --- matrix products


@pytest.mark.parametrize(("data_type", "tolerance"), [("float32", 1e-4), ("int8", 0.02)])
def test_the_products_of_onnxruntime_are_products(data_type: str, tolerance: float) -> None:
    import numpy as np

    ((name, multiply),) = probe_module._onnxruntime_products(data_type, 64, 1).items()
    random = np.random.default_rng(0)
    left = random.standard_normal((64, 64), dtype=np.float32)
    if data_type == "float32":
        expected = left @ random.standard_normal((64, 64), dtype=np.float32)
    else:
        expected = left @ (random.integers(-127, 128, (64, 64), dtype=np.int8).astype(np.float32) * np.float32(0.01))
    (product,) = multiply()  # type: ignore[misc]
    assert name.startswith("onnxruntime ")
    assert np.abs(product - expected).max() <= tolerance * np.abs(expected).max()


def test_without_onnxruntime_only_torch_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert probe_module._onnxruntime_products("float32", 8, 1) == {}
    assert probe_module._onnxruntime_version() is None


# --- the worker


def python_that_runs(code: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let the worker be a script of ours."""
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\n{code}\n", encoding="utf-8")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))


def test_the_worker_is_started_as_a_module_that_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python_that_runs(f'echo "$@" > {tmp_path}/arguments; echo noise; cat {tmp_path}/result', monkeypatch, tmp_path)
    (tmp_path / "result").write_text(a_result().model_dump_json(), encoding="utf-8")
    assert measure_in_worker(seconds=1.5) == a_result()
    arguments = (tmp_path / "arguments").read_text().split()
    assert arguments == ["-P", "-m", "pipeline.hardware.probe", "--measure", "--seconds", "1.5"]
    measure_in_worker(seconds=1.5, threads=3)
    assert (tmp_path / "arguments").read_text().split() == [*arguments, "--threads", "3"]


def test_a_worker_that_fails_is_a_host_error_with_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python_that_runs("echo traceback >&2; echo 'ImportError: no torch' >&2; exit 3", monkeypatch, tmp_path)
    with pytest.raises(HostError, match=r"exit status 3\): ImportError: no torch"):
        measure_in_worker()


def test_a_worker_that_says_nothing_is_a_host_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python_that_runs("exit 0", monkeypatch, tmp_path)
    with pytest.raises(HostError, match="something else than its result"):
        measure_in_worker()


def test_a_failed_measurement_keeps_nothing(tmp_path: Path) -> None:
    def failing() -> ProbeResult:
        raise HostError("no torch")

    with pytest.raises(HostError):
        probe(a_host(), tmp_path / "results", measure=failing)
    assert not (tmp_path / "results").exists()


@pytest.mark.slow
def test_the_real_worker_measures_this_machine_wherever_it_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('a file of the user was imported')", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    result = measure_in_worker(seconds=0.2, threads=1)
    assert result.threads == 1
    assert result.onnxruntime is not None
    float32 = result.gemm_gflops["float32"]
    assert float32 is not None
    assert 0 < float32.low <= float32.median <= float32.value
    assert 0 < result.bandwidth_gb_per_s.low <= result.bandwidth_gb_per_s.value
    assert set(result.gemm_gflops) == {"float32", "bfloat16", "float16", "int8"}
    assert set(result.gemm_kernels) == {name for name, figure in result.gemm_gflops.items() if figure}
