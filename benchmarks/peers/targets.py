"""Whether the targets are met, and by how much not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.measure.statistics import Interval

SPEED = 1.1
"""Times the best peer's tokens per second, for prefill and for decode, with one artifact."""

TIME_SHARE, MEMORY_SHARE = 1 / 3, 1 / 10
"""Of the next best conversion's seconds and of its peak memory."""


@dataclass(frozen=True)
class Peer:
    """A peer at one kind of work: its speed, our artifact's over it, and its divergence from the reference (nats)."""

    name: str
    tokens_per_s: float
    ratio: Interval
    divergence: float | None


@dataclass(frozen=True)
class Verdict:
    """What is said of one target."""

    target: str
    met: bool
    why: str


def judge_speed(what: str, peers: list[Peer], divergence: float | None) -> Verdict:
    """Our artifact against the fastest peer at `what`.

    The target is met where the whole interval lies at or above SPEED and our `divergence` is no larger than the peer's.

    Raises: ValueError where there is no peer.
    """
    target = f"{what}: at least {SPEED:g} times the best peer's speed, at equal or smaller divergence"
    best = max(peers, key=lambda peer: peer.tokens_per_s)
    low, high = best.ratio.low, best.ratio.high
    said = f"{best.ratio.median:.2f} ({low:.2f}–{high:.2f}) times {best.name}"
    if low >= SPEED:
        fast = True
    else:
        fast = False
        missing = SPEED / best.ratio.median - 1
        said += f"; {missing:.0%} short" if missing > 0 else f"; the interval begins {SPEED / low - 1:.0%} below it"
    if divergence is None or best.divergence is None:
        return Verdict(target, False, f"{said}; a divergence is not known")
    good = divergence <= best.divergence
    word = "no larger" if good else f"{divergence / best.divergence:.2f} times as large"
    return Verdict(target, fast and good, f"{said}; divergence {divergence:.2g} against {best.divergence:.2g}, {word}")


def judge_worse(what: str, peers: list[Peer], divergence: float | None) -> str | None:
    """The fastest of the peers whose divergence is below ours, in words; None where there is none."""
    better = [p for p in peers if divergence is not None and p.divergence is not None and p.divergence < divergence]
    if not better:
        return None
    best = max(better, key=lambda peer: peer.tokens_per_s)
    ratio = best.ratio
    return (
        f"{what}: of the {len(better)} peers with a smaller divergence, {best.name} is the fastest; ours is "
        f"{ratio.median:.2f} ({ratio.low:.2f}–{ratio.high:.2f}) times as fast"
    )


def judge_conversion(name: str, own: float, others: Mapping[str, float], *, share: float, unit: str) -> Verdict:
    """Our conversion's seconds, or gigabytes, against the best of the others'.

    Raises: ValueError where there is no other.
    """
    best = min(others, key=lambda other: others[other])
    least = others[best]
    target = f"conversion, {name}: at most 1/{1 / share:.0f} of the next best"
    said = f"{own:.2f} {unit} against {least:.2f} {unit} of {best}: {own / least:.2f} of it"
    if own <= share * least:
        return Verdict(target, True, said)
    return Verdict(target, False, f"{said}, {own / (share * least):.1f} times what the target allows")
