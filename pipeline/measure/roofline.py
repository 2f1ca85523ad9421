"""How near a stage comes to what the machine can do, and what another machine could do at most.

The roofline (Williams, Waterman and Patterson 2009): an iteration takes at least as long as memory needs for the bytes
that it reads, and at least as long as the cores need for its operations. MBU is the share of the first ceiling that was
reached, MFU that of the second. Bytes and operations are counted (`work_counts`), the host's ceilings measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from pipeline.hardware.probe import Figure, ProbeResult
from pipeline.hardware.profile import LOCAL, HardwareProfile
from pipeline.measure.work_counts import Work
from pipeline.measure.workload import Point
from pipeline.report.schema import Roofline, Target

FAR_BELOW = 5.0
"""A stage is flagged where a sibling reaches more than so many times its share of the roofline,"""

SLOWER = 2.0
"""and takes less than its time divided by this: a small stage whose calls cost what a large one's do is no worse."""

LEAST_SHARE = 0.01
"""Whatever its siblings reach, a stage is flagged below this share of the roofline."""

LAUNCH_S = {"onnx": 20e-6, "torch": 3e-3}
"""Seconds that calling one operator of a graph may take (for torch: one decoder layer) whatever it computes. A stage
that takes no longer than its calls may is small, not slow: its share of the roofline says nothing."""

FLOOR_LAUNCHES = 5.0
"""Below LEAST_SHARE, it is flagged only where it takes so many times as long as its calls may."""


class Ceilings(NamedTuple):
    """What a machine can do at most; None where that is not known."""

    bandwidth_gb_per_s: float | None
    gflops: Mapping[str, float | None]
    """By data type; None where there is no arithmetic in it: kernels widen to float32."""

    def rate(self, dtype: str) -> float | None:
        """GFLOP/s in that data type; None where nobody knows."""
        if dtype not in self.gflops:
            return None
        return self.gflops[dtype] or self.gflops.get("float32")


class Timing(NamedTuple):
    """The work of one iteration at a workload point, and the seconds that it took (None: it was not measured)."""

    point: Point
    work: Work
    seconds: float | None
    best_s: float | None = None
    """In the fastest block: other work on the machine only ever slows one. None: `seconds`."""


class Subject(NamedTuple):
    """A stage whose roofline is wanted."""

    name: str
    format: str
    timings: Sequence[Timing]
    reasons: Sequence[str] = ()
    """What is known of its kernels, as "15 MatMulNBits: accuracy_level 0"."""
    fits: bool | None = None

    def first(self, *kinds: str) -> Timing | None:
        """The timing of the first point of the first of these kinds that there is."""
        return next((t for kind in kinds for t in self.timings if t.point.kind == kind), None)


def host_ceilings(probed: ProbeResult | None, seen: Sequence[Figure] = ()) -> Ceilings:
    """Those of the host, measured. `seen` are bandwidths from beside the measurement: the best of all is the ceiling,
    as other work on the machine only ever lowers one.
    """
    if probed is None:
        return Ceilings(max((f.value for f in seen), default=None), {})
    best = max(f.value for f in (probed.bandwidth_gb_per_s, *seen))
    return Ceilings(best, {dtype: f.value if f else None for dtype, f in probed.gemm_gflops.items()})


def target_ceilings(profile: HardwareProfile, host: Ceilings) -> Ceilings:
    """Those of the recipe's profile; of `local`, the measured ones."""
    if profile.name == LOCAL:
        return host
    return Ceilings(profile.bandwidth_gb_per_s, {str(dtype): rate for dtype, rate in profile.peak_gflops.items()})


def rooflines(subjects: Sequence[Subject], *, host: Ceilings, target: Ceilings) -> dict[str, Roofline]:
    """The rooflines of a run's stages, each flagged where it is far below its siblings'."""
    return {s.name: _roofline(s, subjects, host=host, target=target) for s in subjects if s.timings}


def _roofline(subject: Subject, subjects: Sequence[Subject], *, host: Ceilings, target: Ceilings) -> Roofline:
    decode, prompt = subject.first("decode"), subject.first("prefill", "forward")
    main = decode or prompt
    assert main is not None
    dtype = main.work.compute_dtype
    return Roofline(
        bytes_per_token=round(decode.work.bytes_read / decode.work.tokens) if decode else None,
        flops_per_token=_per_token(decode),
        prefill_flops_per_token=_per_token(prompt),
        bandwidth_gb_per_s=host.bandwidth_gb_per_s,
        gflops=host.rate(dtype) if dtype else None,
        compute_dtype=dtype,
        mbu=_ratio(_memory_s(decode.work, host), decode.seconds) if decode else None,
        mfu=_ratio(_arithmetic_s(prompt.work, host), prompt.seconds) if prompt else None,
        flag=flag_of(subject, subjects, host),
        target=_target(decode, prompt, target, subject.fits),
    )


def _per_token(timing: Timing | None) -> int | None:
    total = timing.work.total_flops if timing else None
    return round(total / timing.work.tokens) if timing and total is not None else None


def _target(decode: Timing | None, prompt: Timing | None, target: Ceilings, fits: bool | None) -> Target:
    of_decode, of_prompt = (limit_tokens_per_s(t.work, target) if t else None for t in (decode, prompt))
    first = of_decode or of_prompt
    return Target(
        decode_tokens_per_s_limit=of_decode.tokens_per_s if of_decode else None,
        prefill_tokens_per_s_limit=of_prompt.tokens_per_s if of_prompt else None,
        bound_by=first.bound_by if first else None,
        fits=fits,
    )


class Limit(NamedTuple):
    """No machine with these ceilings is faster."""

    tokens_per_s: float
    bound_by: Literal["memory", "arithmetic"]


def limit_tokens_per_s(work: Work, ceilings: Ceilings) -> Limit | None:
    """Tokens a second at most; None where a ceiling is not known, or not all operations are counted."""
    memory, arithmetic = _memory_s(work, ceilings), _arithmetic_s(work, ceilings)
    if memory is None or arithmetic is None or not max(memory, arithmetic):
        return None
    return Limit(work.tokens / max(memory, arithmetic), "memory" if memory >= arithmetic else "arithmetic")


def _memory_s(work: Work, ceilings: Ceilings) -> float | None:
    """Seconds that reading takes at the full bandwidth."""
    bandwidth = ceilings.bandwidth_gb_per_s
    return work.bytes_read / bandwidth / 1e9 if bandwidth else None


def _arithmetic_s(work: Work, ceilings: Ceilings) -> float | None:
    """Seconds that the operations take, those of each data type at its own full rate, one after another."""
    if work.total_flops is None or not work.flops:
        return None
    seconds = 0.0
    for dtype, flops in work.flops.items():
        rate = ceilings.rate(dtype)
        if not rate:
            return None
        seconds += flops / rate / 1e9
    return seconds


def _ratio(least: float | None, seconds: float | None) -> float | None:
    return None if least is None or not seconds else least / seconds


# --- the flag --------------------------------------------------------------------------------------------------------


class _Reached(NamedTuple):
    """A stage's share of the roofline at a point, and the ceiling that it is of."""

    share: float
    of: str
    best_share: float
    best_s: float


def _reached(timing: Timing, ceilings: Ceilings) -> _Reached | None:
    memory, arithmetic = _memory_s(timing.work, ceilings), _arithmetic_s(timing.work, ceilings)
    if not timing.seconds or memory is None or arithmetic is None:
        return None
    least, of = max((memory, "bandwidth"), (arithmetic, f"{timing.work.compute_dtype} arithmetic"))
    best_s = timing.best_s or timing.seconds
    return _Reached(least / timing.seconds, of, least / best_s, best_s)


def flag_of(subject: Subject, subjects: Sequence[Subject], ceilings: Ceilings) -> str | None:
    """What to look at where a stage is far below its siblings, the other stages of its format; None where it is not.

    At a workload point, its share of the roofline is less than a fifth of a sibling's, it takes more than twice that
    sibling's time, and longer than calling its operators may take: all in the fastest block of each, so that no crowded
    hour looks like a slow kernel. What reads from a cache can exceed the bandwidth: such shares count as 1. Below 1 %
    it is flagged without a sibling, too. The first such point of each kind is told.
    """
    found: dict[str, str] = {}
    for timing in subject.timings:
        text = _flag_at(timing, subject, subjects, ceilings)
        if text is not None:
            found.setdefault(timing.point.kind, text)
    if not found:
        return None
    reasons = "; ".join(subject.reasons) or "which kernel it fell to is not known"
    return f"kernel not engaged: {', '.join(found.values())}; {reasons}"


def _flag_at(timing: Timing, subject: Subject, subjects: Sequence[Subject], ceilings: Ceilings) -> str | None:
    mine = _reached(timing, ceilings)
    calls_s = timing.work.launches * LAUNCH_S.get(subject.format, 0.0)
    if mine is None or mine.best_s <= calls_s:
        return None
    siblings = [
        reached
        for other in subjects
        if other.name != subject.name and other.format == subject.format
        for theirs in other.timings
        if theirs.point == timing.point and (reached := _reached(theirs, ceilings)) is not None
    ]
    better = [
        theirs
        for theirs in siblings
        if FAR_BELOW * mine.best_share < min(theirs.best_share, 1.0) and SLOWER * theirs.best_s < mine.best_s
    ]
    said = f"{timing.point.kind} uses {percent(mine.share)} of the {mine.of}"
    if better:
        low, high = (percent(edge(r.share for r in better)) for edge in (min, max))
        return f"{said}, its siblings {low if low == high else f'{low} to {high}'}"
    if mine.best_share < LEAST_SHARE and mine.best_s > FLOOR_LAUNCHES * calls_s:
        return said
    return None


def percent(share: float) -> str:
    """A share in per cent, with two figures below 10 %."""
    return f"{100 * share:.2g} %" if share < 0.0995 else f"{100 * share:.0f} %"
