"""`pipeline reproduce`"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.options import AllowCodeOption, JsonOption

if TYPE_CHECKING:
    from rich.console import Console

    from pipeline.reproduce import Reproduction


def reproduce_verb(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder, or a recipe's name: its latest run.")],
    plan: Annotated[bool, typer.Option("--plan", help="Only say what differs on this machine.")] = False,
    cached: Annotated[
        bool, typer.Option("--cached", help="Take from the store what it has, instead of making every stage anew.")
    ] = False,
    no_measure: Annotated[bool, typer.Option("--no-measure", help="Compare the artifacts only.")] = False,
    allow_code: AllowCodeOption = False,
    runs: Annotated[Path, typer.Option("--runs", help="Folder of the runs' results.")] = Path("runs"),
    json: JsonOption = False,
) -> int:
    """Do a run again and say what came out the same.

    First what differs on this machine; then the run; then its artifacts by digest and its figures. Speeds of two runs
    are unpaired. The exit code is the new run's, or 1 where an artifact differs although nothing differs here.
    """
    from pipeline.cli.live import LiveDisplay
    from pipeline.cli.output import console, print_json
    from pipeline.reproduce import compare_here, read_past_run, reproduce
    from pipeline.store import Store, default_store_path

    store = Store(default_store_path())
    past = read_past_run(run, runs)
    found = compare_here(past, store, allow_code=allow_code)
    output = console()
    if not json:
        _print_differences(found, output)
    if not plan:
        with LiveDisplay() as display:
            found = reproduce(
                past,
                found,
                store=store,
                runs=runs,
                fresh=not cached,
                measure=not no_measure,
                allow_code=allow_code,
                events=display,
            )
        if not json:
            _print_outcome(found, output)
    if json:
        print_json(found.model_dump(mode="json"))
    return found.exit_code


def _print_differences(found: Reproduction, output: Console) -> None:
    if found.differences:
        rows = [(d.what, d.then, d.now) for d in found.differences]
        _table("what differs on this machine", ("", "then", "now"), rows, output)
    else:
        output.print("nothing differs on this machine: packages, host, model, passes, evaluation text are as they were")
    for note in found.notes:
        output.print(f"note: {note}", markup=False, soft_wrap=True)
    output.print()


def _print_outcome(found: Reproduction, output: Console) -> None:
    rows = []
    for a in found.artifacts:
        said = a.outcome if a.made else f"{a.outcome}, from the store"
        said += "" if a.deterministic else " (its pass is not deterministic)"
        rows.append((a.stage, (a.then or "–")[:12], (a.now or "–")[:12], said))
    _table("artifacts", ("stage", "then", "now", "digest"), rows, output)
    output.print()
    if found.figures:
        figures = [(f.stage, f.figure, f.then, f.now, f.says) for f in found.figures]
        _table("figures", ("stage", "figure", "then", "now", ""), figures, output)
        output.print()
    same = sum(a.outcome == "same" for a in found.artifacts)
    output.print(f"{same} of {len(found.artifacts)} artifacts are the same", markup=False)
    typer.echo(f"run: {found.run}")


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], output: Console) -> None:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    output.print(title, style="bold")
    output.print(table)
