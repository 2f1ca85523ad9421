"""Tables of figures that every renderer shows alike: header and cells as words."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from pipeline.report.figures import (
    ABSENT,
    finer_times,
    megabytes,
    number,
    percent,
    rate,
    thousands,
    times,
    times_interval,
)
from pipeline.report.points import point_in_words
from pipeline.report.schema import Contribution, PairedSpeed, Report, Roofline, StageReport
from pipeline.report.verdicts import contradicts, is_idle, margin_of, why_undecided

SAME_ARTIFACT = "it changed nothing: the chain with and without it is the same artifact"


class Table(NamedTuple):
    title: str
    note: str
    header: tuple[str, ...]
    """A name that begins with `>` has its column aligned to the right."""
    rows: tuple[tuple[str, ...], ...]


class Column(NamedTuple):
    """A column of figures, shown where any row has one."""

    name: str
    read: Callable[[StageReport, Roofline], str]


ROOFLINE = (
    Column(">bytes a token", lambda _, r: megabytes(r.bytes_per_token)),
    Column(">operations a decoded token", lambda _, r: thousands(r.flops_per_token)),
    Column(">operations a prompt's token", lambda _, r: thousands(r.prefill_flops_per_token)),
    Column(">MBU", lambda _, r: percent(r.mbu)),
    Column(">MFU", lambda _, r: _with_type(r)),
    Column(">target: decode at most", lambda _, r: _limit(r.target.decode_tokens_per_s_limit if r.target else None)),
    Column(">target: prefill at most", lambda _, r: _limit(r.target.prefill_tokens_per_s_limit if r.target else None)),
    Column("target bound by", lambda _, r: (r.target.bound_by if r.target else None) or ABSENT),
)


def roofline_table(report: Report) -> Table | None:
    """What was counted from each artifact, how much of the host that used, and what the target could reach."""
    found = [(s, s.roofline) for s in report.stages if s.roofline is not None]
    cells = [[column.read(s, r) for s, r in found] for column in ROOFLINE]
    shown = [(column, cell) for column, cell in zip(ROOFLINE, cells, strict=True) if set(cell) - {ABSENT}]
    if not found or not shown:
        return None
    return Table(
        title="Roofline",
        note=_roofline_note(report, [r for _, r in found]),
        header=("stage", *(column.name for column, _ in shown)),
        rows=tuple((s.name, *(cell[i] for _, cell in shown)) for i, (s, _) in enumerate(found)),
    )


def ablation_table(report: Report) -> Table | None:
    """What each pass of a chain contributed to its end."""
    if report.ablation is None:
        return None
    rows: list[tuple[str, ...]] = []
    for found in report.ablation.contributions:
        others = _other_changes(found)
        if found.variant is None or not found.speed:
            why = found.reason or "not measured"
            told = f"{SAME_ARTIFACT}; {why}" if found.same_artifact else why
            rows.append((found.stage, told, *([ABSENT] * 3), *others))
            continue
        rows.append((found.stage, *_paired(found.speed[0], found, report), *others))
        rows += [("", *_paired(point, found, report), "", "", "") for point in found.speed[1:]]
    return Table(
        title="What each pass contributed",
        note=f"The whole chain that ends in {report.ablation.stage}, against the same chain without the pass, from the "
        "same rounds: above 1 × the pass makes it faster, above 1 its perplexity is worse with it.",
        header=("without", "work", ">speed", ">95 %", "verdict", ">perplexity", ">KL", ">size"),
        rows=tuple(rows),
    )


def _paired(point: PairedSpeed, found: Contribution, report: Report) -> tuple[str, str, str, str]:
    ratio, why = point.ratio, why_undecided(point.ratio, point, report)
    interval = times_interval(ratio.ratio, ratio, margin_of(report))
    said = [ratio.verdict, why]
    if contradicts(found, point):
        said = [f"contradiction: timed {ratio.verdict}, and yet {SAME_ARTIFACT}"]
    elif found.same_artifact:
        said.append(SAME_ARTIFACT)
    elif _was_idle(found.stage, report):
        said.append("its own stage changed nothing")
    return point_in_words(point), times(ratio.ratio), interval, ", ".join(filter(None, said))


def _was_idle(name: str, report: Report) -> bool:
    return any(stage.name == name and is_idle(stage) for stage in report.stages)


def _other_changes(found: Contribution) -> tuple[str, str, str]:
    kl, size = found.kl_divergence_change, found.size_bytes_change
    return (
        ABSENT if found.perplexity_ratio is None else finer_times(found.perplexity_ratio),
        number(kl, "+.2g").replace("-", "−"),
        ABSENT if size is None else ("−" if size < 0 else "+") + _bytes(abs(size)),
    )


def _bytes(size: int) -> str:
    return megabytes(size) if size >= 1e6 else f"{thousands(size)}B"


def _roofline_note(report: Report, found: list[Roofline]) -> str:
    bandwidth = next((r.bandwidth_gb_per_s for r in found if r.bandwidth_gb_per_s is not None), None)
    host = f" ({bandwidth:,.1f} GB/s, the best of its readings)" if bandwidth is not None else ""
    return (
        "Bytes and operations are counted from the artifact. MBU is the share of the host's measured bandwidth"
        f"{host} that decode used, MFU the share of its arithmetic that prefill, or forward, used. "
        f"What the target {report.hardware.get('name')} could reach at most is computed from its profile, not measured."
    )


def _with_type(found: Roofline) -> str:
    if found.mfu is None:
        return ABSENT
    return percent(found.mfu) + (f" of {found.compute_dtype}" if found.compute_dtype else "")


def _limit(value: float | None) -> str:
    return ABSENT if value is None else f"{rate(value)} tok/s"
