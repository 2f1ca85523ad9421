"""Two reports compared where nothing can be measured again: ratios that share no rounds, and how far to trust them.

What one run of an artifact differs from the next is seen in the history: runs of equal artifacts on one machine. Each
of the two figures is one such run, so their ratio varies with twice that variance.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from pydantic import ValidationError

from pipeline.comparable import machine_of
from pipeline.measure.statistics import CONFIDENCE, verdict
from pipeline.report.comparison import ComparedSpeed
from pipeline.report.folder import REPORT
from pipeline.report.schema import PointKey, Ratio, Report, Speed, StageReport
from pipeline.reproduce import PastRun

LEAST_RUNS = 3
"""Runs of equal artifacts without which nobody knows how much one run differs from the next."""


class History:
    """How much runs of equal artifacts differ from each other, from the reports of both recipes on A's machine.

    Only runs with A's threads and on A's device tell: with others an artifact takes another time, and is not noise.
    """

    def __init__(self, a: PastRun, b: PastRun) -> None:
        conditions = _conditions(a.report)
        self._times: dict[tuple[str, PointKey], dict[str, list[float]]] = {}
        seen = set()
        for home in (a.folder.resolve().parent, b.folder.resolve().parent):
            for file in sorted(home.glob(f"*/{REPORT}")):
                if file.parent.is_symlink() or file in seen:  # `latest` is one of the others
                    continue
                seen.add(file)
                try:
                    report = Report.model_validate_json(file.read_bytes())
                except (OSError, ValidationError):  # of another version, or being removed
                    continue
                if _conditions(report) == conditions:
                    self._add(report)

    def _add(self, report: Report) -> None:
        for stage in report.stages:
            for point in stage.speed or ():
                if stage.artifact is not None and point.latency_s.median > 0:
                    groups = self._times.setdefault((stage.name, point.point), {})
                    groups.setdefault(stage.artifact.digest, []).append(math.log(point.latency_s.median))

    def spread(self, stage: str, point: PointKey) -> tuple[float, int, int]:
        """(standard deviation of the logarithm of one run's median, its degrees of freedom, runs that told it)."""
        groups = [v for v in self._times.get((stage, point), {}).values() if len(v) > 1]
        freedom = sum(len(values) - 1 for values in groups)
        squares = sum((v - sum(values) / len(values)) ** 2 for values in groups for v in values)
        return (math.sqrt(squares / freedom) if freedom else math.nan), freedom, sum(map(len, groups))


def _conditions(report: Report) -> tuple[list[str], int, str]:
    """What two runs have to share, so that one's time says how the other's may vary."""
    return machine_of(report), report.threads, str(report.hardware.get("device") or "cpu")


def unpaired_speed(a: StageReport, b: StageReport, history: History, margin: float) -> Iterator[ComparedSpeed]:
    """Ratios of the reports' medians, with the interval of two single runs."""
    from scipy import stats

    before = {point.point: point for point in a.speed or ()}
    for new in b.speed or ():
        old = before.get(new.point)
        if old is None or min(old.latency_s.median, new.latency_s.median) <= 0:
            continue
        center = math.log(old.latency_s.median / new.latency_s.median)
        spread, freedom, count = history.spread(b.name, new.point)
        ratio = None
        if count < LEAST_RUNS:
            reason = (
                f"not known: how much one run differs from the next takes {LEAST_RUNS} runs of equal artifacts on this "
                f"machine to tell, and there are {count}"
            )
        else:
            half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, freedom)) * spread * math.sqrt(2)
            low, high = math.exp(center - half), math.exp(center + half)
            ratio = Ratio(ratio=math.exp(center), low=low, high=high, verdict=verdict(low, high, margin=margin))
            reason = "unpaired: from the two reports"
        yield _told(new, old, ratio, count, reason)


def _told(new: Speed, old: Speed, ratio: Ratio | None, count: int, reason: str) -> ComparedSpeed:
    return ComparedSpeed(
        kind=new.kind,
        batch=new.batch,
        prompt=new.prompt,
        new_tokens=new.new_tokens,
        paired=False,
        ratio=ratio,
        a_latency_s=old.latency_s.median,
        b_latency_s=new.latency_s.median,
        runs_in_history=count,
        reason=reason,
    )
