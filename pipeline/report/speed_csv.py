"""The speeds as a table for spreadsheets."""

from __future__ import annotations

import csv
import io
from typing import Any

from pipeline.report.schema import Report


def speed_csv(report: Report) -> str:
    """Every speed with its interval, one line for each stage and workload point."""
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    ends, of_ratio = ("low", "high"), ("", "_low", "_high", "_verdict", "_inside_floor")
    table.writerow(
        ["stage", "kind", "batch", "prompt", "new_tokens", "rounds", "launches", "outliers"]
        + ["tokens_per_s", *(f"tokens_per_s_{e}" for e in ends), "latency_s", *(f"latency_s_{e}" for e in ends)]
        + [f"{of}{end}" for of in ("vs_baseline", "vs_parent") for end in of_ratio]
    )
    for stage in report.stages:
        # a spreadsheet runs what begins with one of these
        name = f"'{stage.name}" if stage.name.startswith(("=", "+", "-", "@")) else stage.name
        for p in stage.speed or ():
            row: list[Any] = [name, p.kind, p.batch, p.prompt, p.new_tokens, p.rounds, p.launches, p.outliers]
            for figure in (p.tokens_per_s, p.latency_s):
                row += [figure.median, figure.low, figure.high]
            for ratio in (p.vs_baseline, p.vs_parent):
                row += [ratio.ratio, ratio.low, ratio.high, ratio.verdict, ratio.inside_floor] if ratio else [""] * 5
            table.writerow(row)
    return out.getvalue()
