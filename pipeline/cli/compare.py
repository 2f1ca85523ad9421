"""`pipeline compare`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.options import JsonOption


def compare_verb(
    run_a: Annotated[str, typer.Argument(metavar="RUN_A", help="A run's folder, or a recipe's name: its latest run.")],
    run_b: Annotated[str, typer.Argument(metavar="RUN_B", help="Another one, that is compared with the first.")],
    stage: Annotated[
        list[str] | None,
        typer.Option("--stage", metavar="STAGE", help="Only this stage of both. May be repeated. Default: all common."),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option("--budget", metavar="S", min=0.001, help="Seconds to measure for. Default: RUN_A's budget_s."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Measure runs that are not comparable, too, and say what was different.")
    ] = False,
    fail_if_slower: Annotated[
        bool, typer.Option("--fail-if-slower", help="End with 1 where a stage of RUN_B was shown to be slower.")
    ] = False,
    runs: Annotated[Path, typer.Option("--runs", help="Folder of the runs' results.")] = Path("runs"),
    json: JsonOption = False,
) -> int:
    """Measure the artifacts of two runs again, interleaved, and compare them.

    Stages of the same name are paired. Runs on other hosts, of other models or with other workloads are refused. Writes
    runs/comparisons/ID/comparison.html, .md and .json.
    """
    from pipeline.cli.live import LiveDisplay
    from pipeline.cli.output import console, print_json
    from pipeline.compare import COMPARISON_HTML, COMPARISON_JSON, COMPARISON_MARKDOWN, compare
    from pipeline.report.comparison_terminal import render_comparison
    from pipeline.reproduce import read_past_run
    from pipeline.store import Store, default_store_path

    a, b = read_past_run(run_a, runs), read_past_run(run_b, runs)
    store = Store(default_store_path())
    with LiveDisplay() as display:
        result = compare(a, b, store=store, runs=runs, stages=stage or (), budget_s=budget, force=force, events=display)
    if json:
        print_json(result.comparison.model_dump(mode="json"))
    else:
        render_comparison(result.comparison, console())
        typer.echo(f"comparison: {result.folder / COMPARISON_HTML}  ({COMPARISON_MARKDOWN}, {COMPARISON_JSON})")
    if result.failed:
        return 3
    return 1 if fail_if_slower and result.comparison.slower else 0
