"""Shares of the roofline, the limits of a target, and the flag of a kernel that is not engaged."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from pipeline.hardware.probe import Figure, ProbeResult
from pipeline.hardware.profile import HardwareProfile
from pipeline.measure.roofline import (
    LAUNCH_S,
    Ceilings,
    Subject,
    Timing,
    flag_of,
    host_ceilings,
    limit_tokens_per_s,
    rooflines,
    target_ceilings,
)
from pipeline.measure.work_counts import Work
from pipeline.measure.workload import Point
from pipeline.report.schema import Roofline

DECODE = Point(kind="decode", batch=1, prompt=128, new_tokens=64)
PREFILL = Point(kind="prefill", batch=1, prompt=128, new_tokens=0)
FORWARD = Point(kind="forward", batch=2, prompt=128, new_tokens=0)

HOST = Ceilings(40.0, {"float32": 100.0, "int8": 400.0, "bfloat16": None})
"""40 GB/s; 100 GFLOP/s in float32, 400 in int8, and no arithmetic in bfloat16."""

MB, GFLOP = 10**6, 10**9


def work(
    *, size: int = 400 * MB, flops: int = GFLOP, dtype: str = "float32", tokens: int = 1, launches: int = 100
) -> Work:
    return Work(tokens=tokens, weights_bytes=size, flops={dtype: flops}, launches=launches)


def decoding(seconds: float | None, *, best_s: float | None = None, **counts: int) -> Timing:
    """A token that reads 400 MB, which takes 10 ms at the full bandwidth."""
    return Timing(DECODE, work(**{"flops": MB, **counts}), seconds, best_s)


def prefilling(seconds: float | None, dtype: str = "float32") -> Timing:
    """A prompt of 128 tokens of 100 GFLOP in all: a second at the full rate in float32."""
    return Timing(PREFILL, work(flops=100 * GFLOP, tokens=128, dtype=dtype), seconds)


def subject(name: str, *timings: Timing, format: str = "onnx", reasons: tuple[str, ...] = ()) -> Subject:
    return Subject(name, format, timings, reasons)


def of(timings: list[Timing], *, target: Ceilings = HOST) -> Roofline:
    return rooflines([subject("it", *timings)], host=HOST, target=target)["it"]


# --- shares


def test_mbu_is_the_share_of_the_bandwidth_that_decode_used() -> None:
    found = of([decoding(0.020), prefilling(4.0)])
    assert found.mbu == pytest.approx(0.5)
    assert found.mfu == pytest.approx(0.25)
    assert (found.bytes_per_token, found.flops_per_token) == (400 * MB, MB)
    assert found.prefill_flops_per_token == 100 * GFLOP // 128


def test_a_reader_can_compute_the_share_from_what_is_printed() -> None:
    batch = Timing(Point(kind="decode", batch=4, prompt=8, new_tokens=2), work(tokens=4), 0.05)
    found = rooflines([subject("it", batch)], host=HOST, target=HOST)["it"]
    tokens_per_s = 4 / 0.05
    assert found.bytes_per_token is not None
    assert found.bandwidth_gb_per_s is not None
    assert found.mbu == pytest.approx(found.bytes_per_token * tokens_per_s / found.bandwidth_gb_per_s / 1e9)


def test_mfu_is_of_the_data_type_that_the_products_compute_in() -> None:
    assert of([prefilling(4.0, "int8")]).mfu == pytest.approx(0.0625)
    assert of([prefilling(4.0, "int8")]).gflops == 400.0
    # without arithmetic of its own, a data type is widened to float32
    assert of([prefilling(4.0, "bfloat16")]).mfu == pytest.approx(0.25)


@pytest.mark.parametrize("share", [0.49, 0.51])
def test_operations_of_each_data_type_take_their_own_time(share: float) -> None:
    """100 GFLOP/s in float32 and 400 in int8: no machine computes the half in float32 at the rate of int8."""
    mixed = Work(
        tokens=1,
        weights_bytes=1,
        flops={"float32": round(share * 100 * GFLOP), "int8": round((1 - share) * 100 * GFLOP)},
        launches=1,
    )
    least_s = share + (1 - share) / 4
    limit = limit_tokens_per_s(mixed, HOST)
    assert limit is not None
    assert limit.tokens_per_s == pytest.approx(1 / least_s)
    assert of([Timing(PREFILL, mixed, 2.0)]).mfu == pytest.approx(least_s / 2)


def test_a_data_type_whose_rate_nobody_knows_has_no_limit() -> None:
    """One that the profile says has no arithmetic of its own is widened; of one that it leaves out nothing is known."""
    counted = work(size=MB, flops=GFLOP, dtype="bfloat16")
    widened = limit_tokens_per_s(counted, Ceilings(40.0, {"float32": 100.0, "bfloat16": None}))
    assert widened is not None
    assert widened.tokens_per_s == pytest.approx(100.0)
    assert limit_tokens_per_s(counted, Ceilings(40.0, {"float32": 100.0})) is None
    assert of([Timing(DECODE, counted, 0.02)], target=Ceilings(40.0, {"float32": 100.0})).mbu is not None


def test_a_whole_pass_counts_where_there_is_no_prompt() -> None:
    found = of([Timing(FORWARD, work(flops=100 * GFLOP, tokens=256), 2.0)])
    assert found.mfu == pytest.approx(0.5)
    assert found.mbu is None


def test_without_a_measurement_there_are_counts_and_limits_alone() -> None:
    found = of([decoding(None), prefilling(None)])
    assert (found.mbu, found.mfu, found.flag) == (None, None, None)
    assert found.bytes_per_token == 400 * MB
    assert found.target is not None
    assert found.target.decode_tokens_per_s_limit == pytest.approx(100.0)


def test_what_could_not_be_counted_has_no_share() -> None:
    part = Timing(DECODE, work().model_copy(update={"uncounted": ("MoE",)}), 0.02)
    found = of([part])
    assert found.flops_per_token is None
    assert found.mbu == pytest.approx(0.5)
    assert found.target is not None
    assert found.target.decode_tokens_per_s_limit is None


# --- ceilings


def probed(**changes: object) -> ProbeResult:
    figures = {"float32": Figure.best_of([80.0, 90.0]), "float16": None}
    values = {
        "measured_at": datetime(2026, 1, 1, tzinfo=UTC),
        "host": {},
        "threads": 2,
        "torch": "2.13.0",
        "load_average_1m": 0.0,
        "bandwidth_gb_per_s": Figure.best_of([30.0, 35.0]),
        "buffer_bytes": 1,
        "gemm_gflops": figures,
        "gemm_kernels": {},
    }
    return ProbeResult.model_validate({**values, **changes})


def test_the_best_bandwidth_that_was_seen_is_the_ceiling() -> None:
    assert host_ceilings(probed()).bandwidth_gb_per_s == 35.0
    assert host_ceilings(probed(), [Figure.best_of([20.0]), Figure.best_of([50.0])]).bandwidth_gb_per_s == 50.0
    assert host_ceilings(None, [Figure.best_of([20.0])]).bandwidth_gb_per_s == 20.0
    assert host_ceilings(None) == Ceilings(None, {})
    assert host_ceilings(probed()).gflops == {"float32": 90.0, "float16": None}


def test_the_local_profile_is_the_measured_host() -> None:
    local = HardwareProfile(name="local", device="cpu", model="this one")
    other = local.model_copy(update={"name": "other", "bandwidth_gb_per_s": 68.0, "peak_gflops": {"float32": 600.0}})
    assert target_ceilings(local, HOST) == HOST
    assert target_ceilings(other, HOST) == Ceilings(68.0, {"float32": 600.0})


@pytest.mark.parametrize(
    ("size", "flops", "limit", "bound_by"),
    [(400 * MB, MB, 100.0, "memory"), (MB, GFLOP, 100.0, "arithmetic")],
)
def test_a_target_is_limited_by_the_lower_of_its_ceilings(size: int, flops: int, limit: float, bound_by: str) -> None:
    found = limit_tokens_per_s(work(size=size, flops=flops), HOST)
    assert found is not None
    assert found.tokens_per_s == pytest.approx(limit)
    assert found.bound_by == bound_by


def test_a_target_of_which_nothing_is_known_has_no_limit() -> None:
    found = of([decoding(0.02)], target=Ceilings(None, {})).target
    assert found is not None
    assert (found.decode_tokens_per_s_limit, found.bound_by) == (None, None)


def test_fits_is_told_as_it_was_predicted() -> None:
    one = subject("it", decoding(0.02))._replace(fits=False)
    found = rooflines([one], host=HOST, target=HOST)["it"].target
    assert found is not None
    assert found.fits is False


# --- the flag


def flags(*subjects: Subject) -> dict[str, str | None]:
    return {s.name: flag_of(s, subjects, HOST) for s in subjects}


def test_a_stage_far_below_its_siblings_is_flagged_with_the_reason() -> None:
    slow = subject("slow", decoding(3.0), prefilling(2.0), reasons=("15 MatMulNBits: accuracy_level 0",))
    fast, faster = (
        subject("fast", decoding(0.033), prefilling(2.1)),
        subject("faster", decoding(0.022), prefilling(2.0)),
    )
    found = flags(slow, fast, faster)
    assert found["slow"] == (
        "kernel not engaged: decode uses 0.33 % of the bandwidth, its siblings 30 % to 45 %; "
        "15 MatMulNBits: accuracy_level 0"
    )
    assert found["fast"] is None
    assert found["faster"] is None


def test_a_prompt_is_judged_by_arithmetic() -> None:
    found = flags(subject("slow", prefilling(80.0)), subject("fast", prefilling(2.0)))
    assert found["slow"] == (
        "kernel not engaged: prefill uses 1.2 % of the float32 arithmetic, its siblings 50 %; "
        "which kernel it fell to is not known"
    )


def test_a_fifth_of_a_siblings_share_is_enough() -> None:
    assert flags(subject("a", decoding(0.099)), subject("b", decoding(0.02)))["a"] is None
    assert flags(subject("a", decoding(0.101)), subject("b", decoding(0.02)))["a"] is not None


def test_a_small_stage_that_takes_no_longer_than_a_large_one_is_not_flagged() -> None:
    """Both take what calling their operators takes: the small one's share of the bandwidth is lower, and it is well."""
    small, large = decoding(0.019, size=40 * MB), decoding(0.02, size=400 * MB)
    assert small.work.bytes_read / 0.019 < large.work.bytes_read / 0.02 / 5
    assert flags(subject("small", small), subject("large", large))["small"] is None


def test_a_tiny_model_whose_time_is_calls_is_not_flagged() -> None:
    calls_s = 100 * LAUNCH_S["onnx"]
    tiny = decoding(0.99 * calls_s, size=10_000)
    assert flags(subject("tiny", tiny), subject("other", decoding(calls_s / 10, size=10_000)))["tiny"] is None


def test_another_runtime_is_no_sibling() -> None:
    eager = subject("eager", decoding(0.2, launches=10), format="torch")
    assert flags(eager, subject("compiled", decoding(0.02, launches=10), format="torch"))["eager"] is not None
    assert flags(eager, subject("onnx", decoding(0.02)))["eager"] is None


def test_what_reads_from_a_cache_is_no_measure_for_what_reads_from_memory() -> None:
    """Ten times the bandwidth is a cache's: the one that fills half of it is well."""
    cached, plain = decoding(0.0001, size=40 * MB), decoding(0.02)
    assert flags(subject("plain", plain), subject("cached", cached))["plain"] is None


def test_a_crowded_hour_is_no_slow_kernel() -> None:
    crowded, fine = decoding(3.0, best_s=0.03), decoding(0.02, best_s=0.02)
    assert flags(subject("crowded", crowded), subject("fine", fine))["crowded"] is None
    assert flags(subject("crowded", decoding(3.0, best_s=2.9)), subject("fine", fine))["crowded"] is not None


def test_other_workload_points_are_not_compared() -> None:
    longer = Timing(Point(kind="decode", batch=1, prompt=4096, new_tokens=64), work(), 0.5)
    assert flags(subject("a", longer), subject("b", decoding(0.02)))["a"] is None


def test_without_siblings_there_is_a_floor() -> None:
    assert flags(subject("alone", decoding(0.9)))["alone"] is None
    assert flags(subject("alone", decoding(1.1)))["alone"] == (
        "kernel not engaged: decode uses 0.91 % of the bandwidth; which kernel it fell to is not known"
    )


def test_the_floor_is_none_for_what_is_small() -> None:
    calls_s = 100 * LAUNCH_S["onnx"]
    assert flags(subject("alone", decoding(4 * calls_s, size=MB)))["alone"] is None
    assert flags(subject("alone", decoding(6 * calls_s, size=MB)))["alone"] is not None


def test_without_ceilings_nothing_is_flagged() -> None:
    slow, fast = subject("slow", decoding(3.0)), subject("fast", decoding(0.02))
    assert flag_of(slow, [slow, fast], Ceilings(None, {})) is None
