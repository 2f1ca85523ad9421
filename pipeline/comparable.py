"""Whether two runs can be compared: what they do not share with each other, or with this machine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.artifact import canonical_json
from pipeline.hardware import describe_host
from pipeline.recipe.schema import Quality
from pipeline.report.comparison import Unlike
from pipeline.report.schema import Report
from pipeline.reproduce import PastRun

MACHINE = {
    "cpu_model": "processor",
    "physical_cores": "cores",
    "logical_cores": "logical cores",
    "memory_bytes": "memory",
    "gpus": "GPUs",
    "architecture": "architecture",
}
"""What makes a host another one. Its software may be newer: both runs' artifacts meet the same one here."""

ABSENT = "–"


def unlike(a: PastRun, b: PastRun) -> Iterator[Unlike]:
    """What the runs do not share with each other, or with this machine."""
    here = describe_host().model_dump(mode="json")
    for field, what in MACHINE.items():
        values = [_machine(host, field) for host in (a.report.host, b.report.host, here)]
        if len(set(values)) > 1:
            yield Unlike(what=what, a=values[0], b=values[1], here=values[2])
    before, after = (run.recipe.evaluate for run in (a, b))
    told: list[tuple[str, Any, Any]] = [
        ("device", a.report.hardware.get("device"), b.report.hardware.get("device")),
        ("threads", a.report.threads, b.report.threads),
        ("workload", before.workload.model_dump(mode="json"), after.workload.model_dump(mode="json")),
        ("evaluation text", text_of(a.report), text_of(b.report)),
        ("tokens that quality is measured on", scoring_of(before.quality), scoring_of(after.quality)),
    ]
    if _same_model(a.report) != _same_model(b.report):
        told.append(("model", _model(a.report), _model(b.report)))
    for what, old, new in told:
        if old != new:
            yield Unlike(what=what, a=_short(old), b=_short(new))


def difference(unlike: Unlike) -> str:
    here = f", {unlike.here} here" if unlike.here is not None else ""
    return f"{unlike.what}: {unlike.a} in RUN_A, {unlike.b} in RUN_B{here}"


def _machine(host: Mapping[str, Any], field: str) -> str:
    value = host.get(field)
    if field == "memory_bytes" and isinstance(value, int):
        return f"{value / 2**30:.1f} GiB"
    if field == "gpus":
        return ", ".join(str(gpu.get("name")) for gpu in value or () if isinstance(gpu, dict)) or "none"
    return ABSENT if value is None else str(value)


def text_of(report: Report) -> str:
    return report.lock.digests.get("evaluation_text", ABSENT)[:12]


def scoring_of(quality: Quality) -> dict[str, int]:
    return {"tokens": quality.tokens, "window": quality.window, "stride": quality.stride}


def _model(report: Report) -> str:
    source = report.model.source if report.model else ABSENT
    digest = report.lock.digests.get("source")
    return f"{source} ({digest[:12]})" if digest else source


def _same_model(report: Report) -> str:
    """What tells one model from another: its contents, else its name."""
    return report.lock.digests.get("source") or (report.model.source if report.model else ABSENT)


def _short(value: Any) -> str:
    return value if isinstance(value, str) else canonical_json(value).decode()


def machine_of(report: Report) -> list[str]:
    """What tells the machine that a run was measured on from another."""
    return [_machine(report.host, field) for field in MACHINE]
