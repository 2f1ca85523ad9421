"""`pipeline cache`"""

from __future__ import annotations

import typer

from pipeline.cli.options import JsonOption

app = typer.Typer(help="The store of artifacts.", no_args_is_help=True)


@app.command("path")
def path_verb() -> None:
    """Print the store's folder."""
    from pipeline.store import default_store_path

    typer.echo(str(default_store_path()))


@app.command("list")
def list_verb(json: JsonOption = False) -> None:
    """List the stages whose artifacts are in the store, the newest first."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from pipeline.cli.output import console, print_json
    from pipeline.report.terminal import megabytes
    from pipeline.store import Store, default_store_path
    from pipeline.store.listing import list_store

    rows = list_store(Store(default_store_path()))
    if json:
        print_json([row.model_dump(mode="json") for row in rows])
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in ("made (UTC)", "recipe", "stage", "pass", "artifact", "format"):
        table.add_column(column, overflow="fold")
    table.add_column("size", justify="right", overflow="fold")
    table.add_column("in store", justify="right", overflow="fold")
    table.add_column("alone", justify="right", overflow="fold")
    for row in rows:
        table.add_row(
            row.created[:16].replace("T", " "),
            escape(row.recipe),
            row.stage,
            row.pass_name,
            row.artifact[:12],
            row.format,
            megabytes(row.size_bytes),
            megabytes(row.stored_bytes),
            megabytes(row.unique_bytes),
        )
    console().print(table)
