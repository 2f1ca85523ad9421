"""`pipeline report`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.options import JsonOption


def report_verb(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder, or a recipe's name: its latest run.")],
    json: JsonOption = False,
    runs: Annotated[Path, typer.Option("--runs", help="Folder of the runs' results.")] = Path("runs"),
) -> None:
    """Show the report of a run again."""
    from pipeline.cli.output import console, print_json
    from pipeline.report.folder import read_report
    from pipeline.report.terminal import render

    report = read_report(run, runs)
    if json:
        print_json(report.model_dump(mode="json", by_alias=True))
    else:
        render(report, console())
