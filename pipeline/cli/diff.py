"""`pipeline diff`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.options import JsonOption


def diff_verb(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder, or a recipe's name: its latest run.")],
    first: Annotated[str, typer.Argument(metavar="STAGE_A", help="A stage of the run.")],
    second: Annotated[str, typer.Argument(metavar="STAGE_B", help="The stage to compare it with.")],
    json: JsonOption = False,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write one HTML file that needs nothing else.")
    ] = None,
    runs: Annotated[Path, typer.Option("--runs", help="Folder of the runs' results.")] = Path("runs"),
) -> None:
    """Show what differs between two stages of a run.

    Operators, attributes, data types, weights, execution block, interface and size; the changed nodes by layer.
    """
    from pipeline.cli.output import print_json
    from pipeline.diff import diff_stages
    from pipeline.diff_page import diff_as_html, diff_as_text
    from pipeline.errors import RecipeError
    from pipeline.store import Store, default_store_path

    if html is not None and (html.is_dir() or not html.absolute().parent.is_dir()):
        problem = "is a folder; give a file" if html.is_dir() else f"there is no folder {html.absolute().parent}"
        raise RecipeError(f"--html {html}: {problem}")
    if first == second:
        raise RecipeError(f"both are the stage {first!r}", hint="name two stages of the run")
    found = diff_stages(run, first, second, store=Store(default_store_path()), runs=runs)
    if html is not None:
        html.write_text(diff_as_html(found), encoding="utf-8")
    if json:
        print_json(found.model_dump(mode="json"))
    elif html is None:
        typer.echo(diff_as_text(found))
    else:
        typer.echo(f"written to {html}", err=True)
