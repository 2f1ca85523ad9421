"""What recipes took at real sizes, from their runs' reports.

    pipeline run llama-1b-cpu
    pipeline run llama2-7b-random-cpu --only int4_compiled --set evaluate.baseline=int4_compiled
    python benchmarks/real_sizes.py runs/llama-1b-cpu/latest runs/llama2-7b-random-cpu/latest     # docs/real-sizes.md

Nothing is measured here: every figure stands in the report.json of one of the runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from pipeline.report import figures
from pipeline.report.folder import read_report
from pipeline.report.markdown import plain, table
from pipeline.report.schema import Report, Speed, StageReport

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "real-sizes.md"

INTRODUCTION = """# At real sizes

What recipes for models of a billion parameters and more took and gave on a machine with two cores, as their runs'
reports say it; `python benchmarks/real_sizes.py RUN …` writes this page from them. Memory is what is anonymous or
shared, of all processes, at its highest; files that are only mapped do not count. Speeds are tokens per second with
95 % intervals. A dash stands where nothing was measured, as with `measure: false`. The model of 1.1 billion parameters
beside other tools: [peers](peers.md). `python benchmarks/export_tracing.py` shows what tracing takes and what is saved
of it, `python benchmarks/loading.py RUN STAGE …` what loading takes, several times over."""


def page(reports: list[Report]) -> str:
    parts = [INTRODUCTION]
    for report in reports:
        parts += ["", *section(report)]
    return "\n".join(parts).rstrip() + "\n"


def section(report: Report) -> Iterator[str]:
    host, memory = report.host, figures.megabytes(report.host.get("memory_bytes"))
    only = "" if report.baseline == "source" else f": {plain(report.baseline)} and what is compared with it"
    yield f"## {plain(report.recipe)}{only}\n"
    made_s = sum(stage.cost.wall_s or 0 for stage in report.stages)
    yield (
        f"{plain(report.description)}. Run on {report.created[:10]}, "
        f"{plain(host.get('cpu_model'))}, {host.get('physical_cores')} cores, {memory}: "
        f"{figures.duration(report.wall_s)}; making all stages, when each was made, took {figures.duration(made_s)}.\n"
    )
    yield from table(
        ["stage", ">made in", ">memory to make", ">size", ">loads warm in", ">memory to run"],
        [
            [
                plain(s.name),
                figures.seconds(s.cost.wall_s),
                figures.megabytes(s.cost.peak_memory_bytes),
                figures.megabytes(s.artifact.size_bytes if s.artifact else None),
                figures.seconds(s.load.warm_s if s.load else None),
                figures.megabytes(s.inference_peak_memory_bytes),
            ]
            for s in report.stages
        ],
    )
    yield ""
    measured = [s for s in report.stages if s.speed]
    if measured:
        yield f"{rounds(report)}KL divergence is that from {report.baseline} on the same tokens, in nats per token.\n"
        rows = [[plain(s.name), rate(s, "prefill"), rate(s, "decode"), divergence(s)] for s in measured]
        yield from table(["stage", ">prefill", ">decode", ">KL divergence"], rows)
        yield ""
    if report.gates:
        rows = [[f"`{g.gate}`", g.result, figures.gate_value(g.observed)] for g in report.gates]
        yield from table(["gate", "result", ">value"], rows)
        yield ""
    for note in report.notes:
        yield f"- {plain(note)}"


def rounds(report: Report) -> str:
    found = report.schedule
    return f"{found.rounds} rounds in {found.launches} launch{'es' * (found.launches > 1)}. " if found else ""


def rate(stage: StageReport, kind: str) -> str:
    found: list[Speed] = [point for point in stage.speed or () if point.kind == kind]
    return ", ".join(
        f"{figures.rate(p.tokens_per_s.median)} ({figures.rate_interval(p.tokens_per_s.median, p.tokens_per_s)})"
        for p in found
    )


def divergence(stage: StageReport) -> str:
    against = stage.quality.vs_baseline if stage.quality else None
    return f"{against.kl_divergence:.2g}" if against is not None and against.kl_divergence is not None else "–"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="+", help="folders of runs, or ids below runs/")
    asked = parser.parse_args()
    PAGE.write_text(page([read_report(run, Path("runs")) for run in asked.runs]), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
